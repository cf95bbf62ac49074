"""Corrupted inputs against closed forms."""

import pytest
import torch
from tests import tolerances

from batchnorm.studies.corruptions import corrupted


def images() -> torch.Tensor:
    """Values from −2 to 6, so that a unit is 8: one pixel of 6 in the middle of −2."""
    x = torch.full((2, 1, 7, 7), -2.0)
    x[:, :, 3, 3] = 6.0
    return x


def test_each_does_what_it_says() -> None:
    x = images()
    changed = corrupted(x)
    assert set(changed) == {"noise", "contrast", "brightness", "blur"}
    assert torch.equal(x, images())
    spread = torch.full_like(x, -2.0)
    spread[:, :, 2:5, 2:5] = -2 + 8 / 9
    torch.testing.assert_close(changed["blur"], spread)
    brighter = torch.full_like(x, -2 + 0.3 * 8)
    brighter[:, :, 3, 3] = 6.0  # nothing is brighter than the brightest
    torch.testing.assert_close(changed["brightness"], brighter)
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(changed["contrast"], mean + 0.3 * (x - mean))


def test_noise_has_its_size_and_is_the_same_each_time() -> None:
    x = torch.full((200, 500), 0.5)
    x[0, 0], x[0, 1] = -10, 11  # a range in which the noise is not cut off: 21
    first, again = corrupted(x), corrupted(x)
    assert torch.equal(first["noise"], again["noise"])
    assert float((first["noise"] - x)[1:].std()) == pytest.approx(
        0.3 * 21 * _cut(0.5), rel=tolerances.SAMPLED
    )
    assert "blur" not in first


def _cut(middle: float) -> float:
    """Standard deviation over σ of Gaussian noise around ½ that is cut off at 0 and 1, σ = 0.3."""
    z = torch.distributions.Normal(0.0, 1.0)
    a = torch.tensor(middle / 0.3)
    inside = 1 - 2 * (1 - z.cdf(a)) - 2 * a * z.log_prob(a).exp()
    return float((inside + 2 * (1 - z.cdf(a)) * a**2).sqrt())
