"""The activations and their slopes, by the codes of :mod:`batchnorm.ops`."""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
LEAKY_RELU = tl.constexpr(3)
SILU = tl.constexpr(4)
GELU = tl.constexpr(5)
HARDSWISH = tl.constexpr(6)
LEAKY_SLOPE = tl.constexpr(0.01)

ROOT_HALF = tl.constexpr(0.5**0.5)
ROOT_2_PI = tl.constexpr(2.5066282746310002)


@triton.jit
def _distribution(z):
    return 0.5 * (1 + tl.erf(z * ROOT_HALF))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return act(z)."""
    # Comparisons, not maxima, so that NaN passes.
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == RELU6:
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z <= 0, z * LEAKY_SLOPE, z)
    elif ACTIVATION == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == GELU:
        z = z * _distribution(z)
    elif ACTIVATION == HARDSWISH:
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3) / 6))
    return z


@triton.jit
def is_open(z, ACTIVATION: tl.constexpr):
    """Tell where the slope of a piecewise linear activation is 1."""
    if ACTIVATION == RELU6:
        return (z > 0) & (z < 6)
    else:
        return z > 0


@triton.jit
def through_gate(dy, open_, ACTIVATION: tl.constexpr):
    """Multiply dy by the slope of a piecewise linear activation."""
    if ACTIVATION == LEAKY_RELU:
        return tl.where(open_, dy, dy * LEAKY_SLOPE)
    else:
        return tl.where(open_, dy, 0.0)


@triton.jit
def through(dy, z, ACTIVATION: tl.constexpr):
    """Multiply dy by the slope at z."""
    if ACTIVATION == SILU:
        s = 1 / (1 + tl.exp(-z))
        dy = dy * (s * (1 + z * (1 - s)))
    elif ACTIVATION == GELU:
        dy = dy * (_distribution(z) + z * tl.exp(-0.5 * z * z) / ROOT_2_PI)
    elif ACTIVATION == HARDSWISH:
        dy = dy * tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 3 + 0.5))
    elif ACTIVATION != NONE:
        dy = through_gate(dy, is_open(z, ACTIVATION), ACTIVATION)
    return dy
