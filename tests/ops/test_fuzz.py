"""Any loaded implementation, on drawn shapes, strides, types and options.

The oracle is the reference in float64.
"""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from tests import tolerances
from tests.device import DEVICE, INTERPRETED

from batchnorm import functional, ops
from batchnorm.ops import reference

TOLERANCE = {
    torch.float64: tolerances.DOUBLE,
    torch.float32: tolerances.SINGLE,
    torch.bfloat16: tolerances.HALF,
    torch.float16: tolerances.HALF,
}


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def reversed_axes(x):
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def every_other(x):
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def one_sample_repeated(x):
    return x[:1].expand_as(x)


LAYOUTS = [contiguous, channels_last, reversed_axes, every_other]

LARGEST = 3000 if INTERPRETED else 20_000

cases = st.fixed_dictionaries(
    {
        "shape": st.builds(
            lambda n, c, rest: (n, c, *rest),
            st.integers(1, 9),
            st.integers(1, 19),
            st.lists(st.sampled_from([1, 2, 3, 7, 8, 16, 17, 63, 500]), max_size=3),
        ).filter(lambda shape: math.prod(shape) <= LARGEST),
        "layout": st.sampled_from(LAYOUTS),
        "other_layout": st.sampled_from([*LAYOUTS, one_sample_repeated]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "offset": st.sampled_from([0.0, 3.0, 1e3]),
        "has_weight": st.booleans(),
        "has_bias": st.booleans(),
        "has_residual": st.booleans(),
        "activation": st.integers(0, len(ops.ACTIVATIONS) - 1),
        "eps": st.sampled_from([1e-5, 1e-3, 0.1]),
        "seed": st.integers(0, 10_000),
    }
)


def build(case):
    generator = torch.Generator().manual_seed(case["seed"])

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    shape, dtype = case["shape"], case["dtype"]
    x = case["layout"](draw(*shape, dtype=dtype) + case["offset"])
    dy = case["other_layout"](draw(*shape, dtype=dtype))
    residual = case["other_layout"](draw(*shape, dtype=dtype)) if case["has_residual"] else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = draw(shape[1], dtype=wide) if case["has_weight"] else None
    bias = draw(shape[1], dtype=wide) if case["has_bias"] else None
    return x, dy, weight, bias, residual


def exact(*tensors):
    return [None if t is None else t.double() for t in tensors]


def check(got, want, dtype, scale=1.0):
    tolerance = TOLERANCE[dtype]
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


def keeps_layout(y, x):
    expected = x if reference.is_channels_last(x) else x.contiguous()
    assert y.dtype == x.dtype
    assert y.is_contiguous() == expected.is_contiguous()
    assert y.movedim(1, -1).is_contiguous() == expected.movedim(1, -1).is_contiguous()


settings = hypothesis.settings(
    max_examples=20 if INTERPRETED else 300, deadline=None, derandomize=True
)


@settings
@hypothesis.given(cases)
def test_training(case):
    x, dy, weight, bias, residual = build(case)
    eps, activation, dtype = case["eps"], case["activation"], case["dtype"]
    op = torch.ops.batchnorm

    y, mean, var, gate = op.training_forward(x, weight, bias, residual, eps, activation)
    wide_x, wide_dy, *wide = exact(x, dy, weight, bias, residual)
    y_, mean_, var_, _ = reference.training_forward(wide_x, *wide, eps, activation)
    check(y, y_, dtype)
    keeps_layout(y, x)
    moments = tolerances.DOUBLE if dtype == torch.float64 else tolerances.MOMENTS
    assert mean.dtype == var.dtype == torch.float64
    assert ((mean - mean_).abs() <= moments * var_.sqrt() + tolerances.DOUBLE * mean_.abs()).all()
    torch.testing.assert_close(var, var_, rtol=moments, atol=tolerances.DOUBLE)
    assert bool(gate.numel()) == reference.uses_gate(residual, activation)

    saved = (None, gate) if gate.numel() else (residual, None)
    gradients = op.training_backward(dy, x, mean, var, weight, bias, *saved, eps, activation)
    # The gate is the forward's own: at a kink, a rounding decides, and backward must agree with
    # forward. Its bits lie as in the memory of x, so the reference sees the same layout.
    saved = (None, gate) if gate.numel() else (wide[2], None)
    expected = reference.training_backward(
        wide_dy,
        reference.laid_out_as(wide_x, reference.dense(x)),
        mean,
        var,
        *wide[:2],
        *saved,
        eps,
        activation,
    )
    n = x.numel() // x.shape[1]
    largest = 1.0 if n == 0 else max(1.0, (1 / (var + eps).sqrt()).max().item())
    dx, dresidual, dweight, dbias = gradients
    check(dx, expected[0], dtype, largest * 4)
    keeps_layout(dx, x)
    check(dresidual, expected[1], dtype)
    check(dweight, expected[2], dtype, math.sqrt(n) * 4)
    check(dbias, expected[3], dtype, math.sqrt(n) * 4)


@settings
@hypothesis.given(cases)
def test_pieces(case):
    x, dy, weight, bias, residual = build(case)
    eps, activation, dtype = case["eps"], case["activation"], case["dtype"]
    op = torch.ops.batchnorm
    # Running statistics, float32: not those of the batch.
    mean = torch.full((x.shape[1],), case["offset"], device=DEVICE)
    var = torch.linspace(0.5, 2, x.shape[1], device=DEVICE)
    wide_x, wide_dy, *wide = exact(x, dy, weight, bias, residual)
    n = x.numel() // x.shape[1]

    y = op.normalize(x, mean, var, weight, bias, residual, eps, activation)
    check(y, reference.normalize(wide_x, mean, var, *wide, eps, activation), dtype, 4)
    keeps_layout(y, x)

    arguments = (mean, var, weight, bias, residual, None, eps, activation)
    sums = op.backward_sums(dy, x, *arguments)
    expected = reference.backward_sums(wide_dy, wide_x, mean, var, *wide, None, eps, activation)
    for got, want in zip(sums[:2], expected[:2], strict=True):
        assert got.dtype == torch.float64
        check(got, want, dtype, math.sqrt(n) * 8)
    check(sums[2], expected[2], dtype, 4)

    means = [(s / n) for s in sums[:2]] if case["has_residual"] else [None, None]
    dx = op.backward_apply(dy, x, mean, var, weight, bias, *means, eps, activation)
    wanted = reference.backward_apply(
        wide_dy, wide_x, mean, var, *wide[:2], *means, eps, activation
    )
    check(dx, wanted, dtype, 8)
    keeps_layout(dx, x)


@settings
@hypothesis.given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([None, "relu", "silu"]),
)
def test_any_shape_and_type_works_or_is_named(shape, dtype, activation):
    """Zero and one sized axes included: a result of the shape of x, or an error that says why."""
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    if len(shape) < 2 or not dtype.is_floating_point:
        error = "x must"
    elif shape[0] == 0 or x.numel() > shape[1]:
        error = None
    else:
        error = "x has no values" if x.numel() == 0 else "Expected more than 1 value per channel"
    if error is not None:
        with pytest.raises((ValueError, TypeError), match=error):
            functional.batch_norm(x, activation=activation)
        return
    y, (mean, var, n) = functional.batch_norm(x, activation=activation)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert mean.shape == var.shape == (shape[1],)
    assert n == (x.numel() // shape[1] if shape[1] else 0)
    assert torch.equal(y, torch.zeros_like(x))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_an_axis_of_size_one_has_two_readings_and_one_gate(samples):
    """(N, 1, 1) is contiguous and channels last at once; the format says which counts."""
    for shape in ((samples, 1, 1), (samples, 5, 1), (samples, 1, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        *_, gate = torch.ops.batchnorm.training_forward(x, None, None, x, 1e-5, 1)
        rows, length = reference.gate_rows(x)
        assert gate.shape == (rows, -(-length // 8))
        assert torch.equal(gate, reference.training_forward(x, None, None, x, 1e-5, 1)[3])
