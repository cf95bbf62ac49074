r"""Batch normalization in readable PyTorch: the oracle, and what runs without a kernel.

[P1] Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1, with μ and σ² taken over the batch and
all positions of a channel, n values in all:

.. math::

    \mu = \tfrac1n \sum x, \quad \sigma^2 = \tfrac1n \sum (x-\mu)^2, \quad
    \hat x = \frac{x-\mu}{\sqrt{\sigma^2+\epsilon}}, \quad z = \gamma\hat x + \beta + r, \quad
    y = \mathrm{act}(z)

and its backward (section 3), collapsed, with :math:`dz = dy\,\mathrm{act}'(z)`:

.. math::

    d\beta = \sum dz, \quad d\gamma = \sum dz\,\hat x, \quad
    dx = \frac{\gamma}{\sqrt{\sigma^2+\epsilon}}
         \left(dz - \tfrac1n d\beta - \tfrac1n \hat x\,d\gamma\right).

Everything is built of differentiable torch operations, so these functions are also the
derivatives of each other's derivatives. Arguments and results are those of the ops
(:mod:`batchnorm.ops`).
"""

import math

import torch
from torch import Tensor

# The position of a name is the code that the ops take.
ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish")
NONE, RELU, RELU6, LEAKY_RELU, SILU, GELU, HARDSWISH = range(len(ACTIVATIONS))
LEAKY_SLOPE = 0.01

# Runs of fewer contiguous positions share a row of the gate: padding each would spoil its packing.
SHORT_RUN = 16

# Statistics are accumulated and kept wider than the data.
STATISTICS_DTYPE = torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type of the arithmetic on values: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Shape a vector (C,) so that it broadcasts along the channels of x."""
    return v.reshape((-1,) + (1,) * (x.dim() - 2))


def reduction_axes(x: Tensor) -> list[int]:
    """Return every axis but the channels."""
    return [0, *range(2, x.dim())]


def is_channels_last(x: Tensor) -> bool:
    """Tell whether the channels are innermost in memory (and no other reading is possible)."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return x itself in one of the two layouts that the ops keep, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def laid_out_as(t: Tensor, x: Tensor) -> Tensor:
    """Return t with the layout of the dense x."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(x) else t.contiguous()


def activate(z: Tensor, activation: int) -> Tensor:
    """Apply the activation."""
    match activation:
        case 0:
            return z
        case 1:
            return z.relu()
        case 2:
            return torch.nn.functional.relu6(z)
        case 3:
            return torch.nn.functional.leaky_relu(z, LEAKY_SLOPE)
        case 4:
            return torch.nn.functional.silu(z)
        case 5:
            return torch.nn.functional.gelu(z)
        case _:
            return torch.nn.functional.hardswish(z)


def slope(z: Tensor, activation: int) -> Tensor:
    """Return the derivative of the activation at z, itself differentiable."""
    match activation:
        case 0:
            return torch.ones_like(z)
        case 1 | 2 | 3:
            return gate_slope(is_open(z, activation), activation, z.dtype)
        case 4:
            s = z.sigmoid()
            return s * (1 + z * (1 - s))
        case 5:
            density = (-0.5 * z * z).exp() / math.sqrt(2 * math.pi)
            return 0.5 * (1 + (z / math.sqrt(2)).erf()) + z * density
        case _:
            return torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z / 3 + 0.5))


def is_open(z: Tensor, activation: int) -> Tensor:
    """Tell where the slope of a piecewise linear activation is 1."""
    return (z > 0) & (z < 6) if activation == RELU6 else z > 0


def gate_slope(gate: Tensor, activation: int, dtype: torch.dtype) -> Tensor:
    """Return the slope of a piecewise linear activation from where it is 1."""
    gate = gate.to(dtype)
    return gate + (1 - gate) * LEAKY_SLOPE if activation == LEAKY_RELU else gate


def uses_gate(residual: Tensor | None, activation: int) -> bool:
    """Tell whether the training forward packs a gate."""
    return residual is not None and activation in (RELU, RELU6, LEAKY_RELU)


def gate_rows(x: Tensor) -> tuple[int, int]:
    """Return the number and the length of the runs of memory that the gate of a dense x packs."""
    n, c, s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if s == 1 or is_channels_last(x):
        return n * s, c
    return (n, c * s) if s < SHORT_RUN else (n * c, s)


def pack_gate(gate: Tensor, x: Tensor) -> Tensor:
    """Pack booleans of the shape of x, one bit each, row by row of x's memory."""
    rows, length = gate_rows(x)
    ordered = gate.movedim(1, -1) if is_channels_last(x) else gate
    bits = torch.nn.functional.pad(ordered.reshape(rows, length), (0, -length % 8))
    places = 2 ** torch.arange(8, device=x.device)
    return (torch.unflatten(bits, 1, (-1, 8)) * places).sum(-1).to(torch.uint8)


def check_gate(gate: Tensor, x: Tensor) -> None:
    """Raise where the gate is not that of a dense x, as kernels read it by x's size."""
    rows, length = gate_rows(x)
    expected = (rows, -(-length // 8))
    if gate.shape != expected:
        raise ValueError(
            f"gate must be what training_forward returned for this x, of shape {expected}, "
            f"or None; got {tuple(gate.shape)}"
        )


def unpack_gate(packed: Tensor, x: Tensor) -> Tensor:
    """Undo :func:`pack_gate`."""
    check_gate(packed, x)
    _, length = gate_rows(x)
    places = 2 ** torch.arange(8, device=x.device)
    bits = (packed.unsqueeze(-1) & places).ne(0).flatten(1)[:, :length]
    if is_channels_last(x):
        return bits.reshape(x.movedim(1, -1).shape).movedim(-1, 1)
    return bits.reshape(x.shape)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel.

    In two passes, and what rounding left of the mean is taken out of both.
    """
    axes = reduction_axes(x)
    x = x.to(STATISTICS_DTYPE)
    mean = x.mean(axes)
    centred = x - per_channel(mean, x)
    remainder = centred.mean(axes)
    var = centred.square().mean(axes) - remainder.square()
    return mean + remainder, var.clamp(min=0)


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and number of the values where the mask (N, *) is true."""
    axes = reduction_axes(x)
    counted = mask.unsqueeze(1)
    count = mask.sum(dtype=STATISTICS_DTYPE)
    # Masked before the arithmetic, so that nothing outside the mask, inf included, is felt.
    x = torch.where(counted, x.to(STATISTICS_DTYPE), 0.0)
    mean = x.sum(axes) / count
    centred = torch.where(counted, x - per_channel(mean, x), 0.0)
    var = centred.square().sum(axes) / count
    return mean, var, count


def merge(mean: Tensor, var: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments of all values from those of their parts, one row each.

    ``share`` (parts, 1) is each part's share of the values. Chan, Golub & LeVeque 1983: no
    difference of two large sums.
    """
    merged = (mean * share).sum(0)
    return merged, ((var + (mean - merged).square()) * share).sum(0)


def scale_and_shift(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre, scale and shift, shaped for x: normalising is (x − centre)·scale + shift.

    The centre is the mean as the arithmetic can hold it; what is left of the mean goes into
    the shift.
    """
    mean, var = mean.to(STATISTICS_DTYPE), var.to(STATISTICS_DTYPE)
    dtype = compute_dtype(x)
    centre = mean.detach().to(dtype)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = (centre - mean) * scale
    if bias is not None:
        shift = shift + bias
    return (
        per_channel(centre, x),
        per_channel(scale.to(dtype), x),
        per_channel(shift.to(dtype), x),
    )


def preactivation(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    """Return z, in the type of the arithmetic."""
    centre, scale, shift = scale_and_shift(x, mean, var, weight, bias, eps)
    z = (x - centre) * scale + shift
    return z if residual is None else z + laid_out_as(residual, x)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """Return y = act(weight·(x − mean)/√(var+eps) + bias + residual)."""
    x = dense(x)
    z = preactivation(x, mean, var, weight, bias, residual, eps)
    return activate(z, activation).to(x.dtype)


def training_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the moments that it was normalised with, and the gate. [P1] Algorithm 1."""
    x = dense(x)
    mean, var = moments(x)
    z = preactivation(x, mean, var, weight, bias, residual, eps)
    if uses_gate(residual, activation):
        gate = pack_gate(is_open(z, activation), x)
    else:
        gate = x.new_empty(0, dtype=torch.uint8)
    return activate(z, activation).to(x.dtype), mean, var, gate


def gradient_of_z(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """Return dz = dy·act′(z), the slope taken from the gate where there is one."""
    dtype = compute_dtype(x)
    dy = laid_out_as(dy, x)
    if activation == NONE:
        return dy.to(dtype)
    if gate is not None:
        return dy * gate_slope(unpack_gate(gate, x), activation, dtype)
    return dy * slope(preactivation(x, mean, var, weight, bias, residual, eps), activation)


def backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σdz, Σdz·x̂ over each channel, and dz where the residual needs it."""
    x = dense(x)
    dz = gradient_of_z(dy, x, mean, var, weight, bias, residual, gate, eps, activation)
    xhat = preactivation(x, mean, var, None, None, None, eps)
    axes = reduction_axes(x)
    sum_dz = dz.sum(axes, dtype=STATISTICS_DTYPE)
    sum_dz_xhat = (dz * xhat).sum(axes, dtype=STATISTICS_DTYPE)
    if activation == NONE or (residual is None and gate is None):
        return sum_dz, sum_dz_xhat, x.new_empty(0)
    return sum_dz, sum_dz_xhat, dz.to(x.dtype)


def backward_apply(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """Return dx = weight/σ·(dz − mean_dz − x̂·mean_dz_xhat)."""
    x = dense(x)
    dz = gradient_of_z(dy, x, mean, var, weight, bias, None, None, eps, activation)
    if mean_dz is not None:
        dz = dz - per_channel(mean_dz.to(dz.dtype), x)
    if mean_dz_xhat is not None:
        xhat = preactivation(x, mean, var, None, None, None, eps)
        dz = dz - xhat * per_channel(mean_dz_xhat.to(dz.dtype), x)
    _, scale, _ = scale_and_shift(x, mean, var, weight, None, eps)
    return (dz * scale).to(x.dtype)


def training_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, residual, weight and bias. [P1] section 3, collapsed."""
    sum_dz, sum_dz_xhat, dz = backward_sums(
        dy, x, mean, var, weight, bias, residual, gate, eps, activation
    )
    if activation != NONE and (residual is not None or gate is not None):
        dy, activation = dz, NONE
    count = x.numel() // x.shape[1]
    mean_dz, mean_dz_xhat = sum_dz / count, sum_dz_xhat / count
    dx = backward_apply(dy, x, mean, var, weight, bias, mean_dz, mean_dz_xhat, eps, activation)
    dtype = compute_dtype(x)
    return dx, dz, sum_dz_xhat.to(dtype), sum_dz.to(dtype)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    n: float | Tensor,
    momentum: float | None,
) -> None:
    """Average a batch into the running statistics, in place; the variance unbiased.

    Without momentum the average is cumulative.
    """
    weight: float | Tensor = 0.0 if momentum is None else momentum
    if num_batches is not None:
        num_batches.add_(1)
        if momentum is None:
            weight = num_batches.to(running_mean.dtype).reciprocal()
    unbiased = var.detach() * (n / (n - 1))
    running_mean.lerp_(mean.detach().to(running_mean.dtype), weight)
    running_var.lerp_(unbiased.to(running_var.dtype), weight)
