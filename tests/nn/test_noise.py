"""The noise of the noisy batch norm against what its distribution says."""

import pytest
import torch
from tests import tolerances

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.nn.noise import Distribution, Noise, Noisy


@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels_last"])
def test_every_unit_has_its_own_mean_and_scale_at_every_step(layout: str) -> None:
    torch.manual_seed(0)
    distribution = Distribution(n_mu=0.5, n_sigma=1.25, r_mu=0.1, r_sigma=0.1)
    a = torch.randn(20_000, 50)
    if layout != "rows":
        a = a.reshape(50, 20, 20, 50).movedim(-1, 1)  # channels last
    if layout == "contiguous":
        a = a.contiguous()
    first, second = distribution.add(a), distribution.add(a)
    assert first.stride() == a.stride()
    values = a.movedim(1, -1).reshape(-1, 50)
    # Least squares of each unit on its own values gives back its scale and its mean.
    fits = []
    for noisy in (result.movedim(1, -1).reshape(-1, 50) for result in (first, second)):
        slope = (values * noisy).mean(0) / values.square().mean(0)
        mean = noisy.mean(0) - slope * values.mean(0)
        rest = noisy - slope * values - mean
        assert -0.51 < mean.min() < -0.3
        assert 0.3 < mean.max() < 0.51
        assert 0.99 < slope.min() < 1.1
        assert 1.15 < slope.max() < 1.26
        # What is left: U(−r_μ, r_μ) of variance r²/3, and N(0, r_σ) times a value of variance 1.
        expected = (0.1**2 / 3 + 0.1**2) ** 0.5
        assert float(rest.std()) == pytest.approx(expected, rel=tolerances.SAMPLED)
        fits.append((mean, slope))
    assert (fits[0][0] - fits[1][0]).abs().mean() > 0.1
    assert (fits[0][1] - fits[1][1]).abs().mean() > 0.02


def test_positions_of_a_unit_share_its_distribution() -> None:
    torch.manual_seed(0)
    noisy = Distribution(r_mu=0, r_sigma=0).add(torch.zeros(4, 3, 5, 5))
    assert torch.equal(noisy, noisy[:1, :, :1, :1].expand_as(noisy))
    assert len(noisy[0, :, 0, 0].unique()) == 3


def test_only_training_is_noisy_and_statistics_are_of_the_batch() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 4, 4) * 2 + 1
    layer, plain = BatchNorm2d(3, statistics=Noisy()), BatchNorm2d(3)
    assert not torch.allclose(layer(x), plain(x))
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert torch.equal(layer.running_var, plain.running_var)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    alone = Noise().eval()
    assert alone(x) is x
    assert not torch.equal(alone.train()(x), x)


def test_noise_reaches_the_gradient_as_the_scale_that_it_is() -> None:
    distribution = Distribution(n_sigma=3.0, r_mu=0, r_sigma=0)
    a = torch.zeros(2, 3, requires_grad=True)
    torch.manual_seed(0)
    distribution.add(a).sum().backward()
    torch.manual_seed(0)
    scale = distribution.add(torch.ones(2, 3))
    torch.manual_seed(0)
    scale = scale - distribution.add(torch.zeros(2, 3))
    torch.testing.assert_close(a.grad, scale, rtol=tolerances.SINGLE, atol=0)


def test_what_cannot_be_fused_is_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="neither a residual nor an activation can be fused"):
        BatchNorm1d(3, statistics=Noisy(), activation="relu")(x)
