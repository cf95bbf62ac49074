"""The reference against torch, against numpy and against the formulas as the paper prints them."""

import numpy as np
import pytest
import torch
from tests import tolerances

from batchnorm.ops import reference

EPS = 1e-5
SHAPES = [
    (7, 3),
    (5, 3, 4),
    (4, 9, 3, 5),
    (2, 3, 2, 3, 4),
    (2, 3, 1, 2, 2, 3),
    (6, 1),
    (2, 3, 1, 1),
]


def draw(shape, seed=0, dtype=torch.float64, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).add_(offset).to(dtype)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_numpy(shape):
    x = draw(shape, offset=3.0)
    mean, var = reference.moments(x)
    axes = (0, *range(2, len(shape)))
    np.testing.assert_allclose(mean, x.numpy().mean(axes), rtol=tolerances.DOUBLE)
    np.testing.assert_allclose(var, x.numpy().var(axes), rtol=tolerances.DOUBLE)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_torch(shape):
    x, w, b = draw(shape), draw(shape[1:2], 1), draw(shape[1:2], 2)
    y, *_ = reference.training_forward(x, w, b, None, EPS, reference.NONE)
    expected = torch.nn.functional.batch_norm(x, None, None, w, b, training=True, eps=EPS)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerances.DOUBLE)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_section_3_as_printed(shape):
    """Line by line of [P1] section 3, uncollapsed, in numpy."""
    x, dy, gamma = draw(shape).numpy(), draw(shape, 1).numpy(), draw(shape[1:2], 2).numpy()
    axes = (0, *range(2, len(shape)))
    m = x.size // shape[1]

    def spread(v):
        return v.reshape(-1, *(1,) * (len(shape) - 2))

    mu, var = x.mean(axes), x.var(axes)
    centred = x - spread(mu)
    dxhat = dy * spread(gamma)
    dvar = (dxhat * centred).sum(axes) * -0.5 * (var + EPS) ** -1.5
    dmu = (-dxhat / spread(np.sqrt(var + EPS))).sum(axes) + dvar * (-2 * centred).mean(axes)
    dx = dxhat / spread(np.sqrt(var + EPS)) + spread(dvar) * 2 * centred / m + spread(dmu) / m
    dgamma = (dy * centred / spread(np.sqrt(var + EPS))).sum(axes)

    x, dy, gamma = map(torch.from_numpy, (x, dy, gamma))
    mean, var = reference.moments(x)
    got = reference.training_backward(dy, x, mean, var, gamma, None, None, None, EPS, 0)
    np.testing.assert_allclose(got[0], dx, atol=tolerances.DOUBLE)
    np.testing.assert_allclose(got[2], dgamma, atol=tolerances.DOUBLE)
    np.testing.assert_allclose(got[3], dy.numpy().sum(axes), atol=tolerances.DOUBLE)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("shape", [(64, 5), (8, 5, 11, 13)])
@pytest.mark.parametrize(
    ("ratio", "tolerance"),
    [(0.0, tolerances.EXACT_STANDARD), (1e3, tolerances.EXACT_OFFSET)],
)
def test_float32_is_exact_at_large_means(shape, layout, ratio, tolerance):
    x = layout(draw(shape, dtype=torch.float32, offset=ratio))
    y, *_ = reference.training_forward(x, None, None, None, EPS, 0)
    exact, *_ = reference.training_forward(x.double(), None, None, None, EPS, 0)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extreme_scales_are_those_of_float64(scale):
    x = draw((16, 3, 4)).mul_(scale).float()
    dy = draw((16, 3, 4), 1).float()

    def both(x, dy):
        y, mean, var, _ = reference.training_forward(x, None, None, None, EPS, 0)
        return y, *reference.training_backward(dy, x, mean, var, None, None, None, None, EPS, 0)

    for got, exact in zip(both(x, dy), both(x.double(), dy.double()), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=tolerances.SINGLE, atol=1e-35)


def test_zero_variance_gives_the_bias():
    b = draw((3,), dtype=torch.float32)
    x = torch.full((4, 3, 5), 0.1) * torch.tensor([1.0, 1e4, -7.0]).view(3, 1)
    y, *_ = reference.training_forward(x, None, b, None, EPS, 0)
    torch.testing.assert_close(y, b.view(3, 1).expand_as(x), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 8, 8), (3, 5, 49), (2, 3, 65)])
def test_gate_packs_one_bit_a_value(shape, layout):
    x = layout(draw(shape))
    gate = x > 0
    packed = reference.pack_gate(gate, x)
    rows, length = reference.gate_rows(x)
    assert packed.shape == (rows, -(-length // 8))
    assert sum(int(byte).bit_count() for byte in packed.flatten()) == int(gate.sum())
    assert torch.equal(reference.unpack_gate(packed, x), gate)


def test_gate_bits_follow_memory():
    """The format that kernels are written to: little-endian bits, a row each run of memory."""
    x = torch.tensor([[[1.0, -1, 1, -1, -1, -1, -1, -1, 1], [-1.0] * 8 + [1]]])
    assert reference.pack_gate(x > 0, x).tolist() == [[0b101, 1, 2]]
    long = torch.cat([torch.full((1, 2, 56), -1.0), x], 2)  # 65: a row for each run
    assert reference.pack_gate(long > 0, long).tolist() == [
        [*[0] * 7, 0b101, 1],
        [*[0] * 8, 1],
    ]
    last = channels_last(x)
    assert reference.pack_gate(last > 0, last).tolist() == [[1], [0], [1], *[[0]] * 5, [3]]


@pytest.mark.parametrize("activation", range(1, len(reference.ACTIVATIONS)))
def test_slope_is_that_of_torch(activation):
    z = torch.cat([draw((50,)) * 4, torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64)])
    z.requires_grad_()
    (expected,) = torch.autograd.grad(reference.activate(z, activation).sum(), z)
    torch.testing.assert_close(
        reference.slope(z.detach(), activation), expected, rtol=0, atol=tolerances.DOUBLE
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x, w = draw((8, 3, 5), dtype=dtype), draw((3,), 1, torch.float32)
    y, mean, *_ = reference.training_forward(x, w, None, None, EPS, 0)
    exact, *_ = reference.training_forward(x.float(), w, None, None, EPS, 0)
    assert (y.dtype, mean.dtype) == (dtype, torch.float64)
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_layouts_are_kept(layout):
    x = layout(draw((2, 3, 4, 5)))
    other = draw((5, 4, 3, 2)).permute(3, 2, 1, 0)
    y, mean, var, gate = reference.training_forward(x, None, None, other, EPS, 1)
    dx, dresidual, *_ = reference.training_backward(
        other, x, mean, var, None, None, None, gate, EPS, 1
    )
    assert y.stride() == dx.stride() == dresidual.stride() == x.stride()
    assert reference.normalize(other, mean, var, None, None, None, EPS, 1).is_contiguous()
