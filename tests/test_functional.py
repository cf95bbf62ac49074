"""The functions: masks against brute force, and what every wrong argument is told."""

import pytest
import torch
from tests import tolerances

from batchnorm import functional


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def mask():
    return torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6


def test_masked_moments_are_those_of_the_values_that_are_left(mask):
    x = draw(4, 3, 5)
    mean, var, n = functional.moments(x, mask=mask)
    for channel in range(3):
        kept = torch.tensor(
            [x[i, channel, j] for i in range(4) for j in range(5) if mask[i, j]],
            dtype=torch.float64,
        )
        assert n == len(kept)
        torch.testing.assert_close(mean[channel], kept.mean(), rtol=tolerances.DOUBLE, atol=0)
        torch.testing.assert_close(
            var[channel], kept.var(correction=0), rtol=tolerances.DOUBLE, atol=0
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
def test_moments_feel_nothing_outside_the_mask(mask, poison):
    x = draw(4, 3, 5)
    poisoned = x.masked_fill(~mask.unsqueeze(1), poison)
    for a, b in zip(
        functional.moments(x, mask=mask), functional.moments(poisoned, mask=mask), strict=True
    ):
        assert torch.equal(a, b)


def test_gradients_feel_nothing_outside_the_mask(mask):
    x, dy = draw(4, 3, 5), draw(4, 3, 5, seed=2)
    outside = ~mask.unsqueeze(1)

    def run(x):
        x = x.clone().requires_grad_()
        y, (mean, var, _) = functional.batch_norm(x, mask=mask)
        (dx,) = torch.autograd.grad(y.masked_fill(outside, 0.0), x, dy)
        return y.masked_fill(outside, 0.0), mean, var, dx.masked_fill(outside, 0.0)

    clean, poisoned = run(x), run(x.masked_fill(outside, 1e300))
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


def test_a_full_mask_is_no_mask():
    x, w, b = draw(4, 3, 5), draw(3, seed=1), draw(3, seed=2)
    dy = draw(4, 3, 5, seed=3)

    def run(mask):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        y, (mean, var, _) = functional.batch_norm(*inputs, activation="silu", mask=mask)
        return y, mean, var, *torch.autograd.grad(y, inputs, dy)

    for a, b in zip(run(None), run(torch.ones(4, 5, dtype=torch.bool)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.DOUBLE)


def test_masked_gradients(mask):
    inputs = [draw(*shape).requires_grad_() for shape in ((4, 3, 5), (3,), (3,))]

    def f(x, w, b):
        y, (mean, var, _) = functional.batch_norm(x, w, b, mask=mask)
        return y, mean, var

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_residual_and_activation_are_fused_as_if_apart():
    x, r = draw(4, 3, 5), draw(4, 3, 5, seed=1)
    for name in functional.ACTIVATIONS:
        y, _ = functional.batch_norm(x, residual=r, activation=name)
        apart = getattr(torch.nn.functional, name)(functional.batch_norm(x).y + r)
        torch.testing.assert_close(y, apart, rtol=0, atol=tolerances.DOUBLE)


def test_evaluation_of_an_empty_batch_is_empty():
    y = functional.normalize(torch.ones(0, 3, 4), torch.zeros(3), torch.ones(3))
    assert y.shape == (0, 3, 4)


X = torch.ones(4, 3, 5)
BAD = {
    "one axis": ({"x": torch.ones(3)}, ValueError, "x must have two or more axes.*unsqueeze"),
    "integers": ({"x": X.long()}, TypeError, r"x must be floating, got torch.int64.*x\.float"),
    "no positions": ({"x": X[:, :, :0]}, ValueError, r"x has no values.*\(4, 3, 0\)"),
    "no channels": ({"x": X[:, :0]}, ValueError, r"x has no values.*\(4, 0, 5\)"),
    "one value": ({"x": X[:1, :, :1]}, ValueError, "Expected more than 1 value.*drop_last.*eval"),
    "weight": ({"weight": torch.ones(4)}, ValueError, r"weight must have.*3 channels.*\(4,\)"),
    "bias": ({"bias": torch.ones(3, 1)}, ValueError, r"bias must have.*3 channels.*\(3, 1\)"),
    "weight device": (
        {"weight": torch.ones(3, device="meta")},
        ValueError,
        "weight is on meta but x is on cpu; move",
    ),
    "weight type": ({"weight": torch.ones(3).half()}, TypeError, r"weight must be.*float16.*to\("),
    "residual shape": ({"residual": X[:1]}, ValueError, r"residual must have.*\(1, 3, 5\).*expand"),
    "residual type": ({"residual": X.half()}, TypeError, "residual must have the type.*float16"),
    "residual device": ({"residual": X.to("meta")}, ValueError, "residual is on meta"),
    "mask shape": (
        {"mask": torch.ones(4, 3, 5, dtype=torch.bool)},
        ValueError,
        r"mask must have.*\(4, 5\), got \(4, 3, 5\)",
    ),
    "mask type": ({"mask": torch.ones(4, 5)}, TypeError, "mask must be boolean, got torch.float32"),
    "mask device": (
        {"mask": torch.ones(4, 5, dtype=torch.bool, device="meta")},
        ValueError,
        "mask is on meta",
    ),
    "empty mask": (
        {"mask": torch.zeros(4, 5, dtype=torch.bool)},
        ValueError,
        "mask must leave more than 1 value",
    ),
    "eps": ({"eps": float("nan")}, ValueError, "eps must be positive .* got nan"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps must be positive"),
    "activation": ({"activation": "tanh"}, ValueError, "activation must be.*relu.*got 'tanh'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=f"(?s){message}"):
        functional.batch_norm(**{"x": X, **arguments})


@pytest.mark.parametrize(
    "case", ["one axis", "integers", "no positions", "mask shape", "mask type"]
)
def test_moments_names_it_too(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=f"(?s){message}"):
        functional.moments(**{"x": X, **arguments})


def test_normalize_names_it_too():
    for name in ("mean", "var", "weight", "bias"):
        statistics = {"mean": torch.zeros(3), "var": torch.ones(3), name: torch.ones(2)}
        with pytest.raises(ValueError, match=rf"{name} must have.*\(2,\)"):
            functional.normalize(X, **statistics)
