"""A network without its redundant biases computes what it did, in both modes, and trains on."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn

import batchnorm
from batchnorm.transforms.strip_bias import strip_bias


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2),
        batchnorm.BatchNorm2d(4, activation="relu"),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Linear(5, 3, bias=False),
        nn.BatchNorm1d(3),
        nn.Linear(3, 2),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
    return model


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, 5, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes_but_the_biases(training):
    model = network().train(training)
    before = copy.deepcopy(model)
    report = strip_bias(model, draw())
    assert report.stripped == {"0": "1", "3": "4", "6": "7"}
    assert report.left == {}
    assert report.largest_difference < tolerances.DOUBLE
    assert model[10].bias is not None
    assert all(m.training == training for m in model.modules())
    for seed in range(3):  # in training the running statistics move
        torch.testing.assert_close(
            model(draw(seed)),
            before(draw(seed)),
            rtol=tolerances.DOUBLE,
            atol=tolerances.DOUBLE,
        )
    torch.testing.assert_close(
        model.eval()(draw()), before.eval()(draw()), rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE
    )


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (batchnorm.BatchNorm1d(4, statistics=batchnorm.Lp(1)), "feels the mean"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), "not the output of a linear operation"),
    ],
    ids=["lp", "relu"],
)
def test_biases_that_count_stay(norm, reason):
    model = nn.Sequential(nn.Linear(3, 4), norm)
    before = copy.deepcopy(model.state_dict())
    report = strip_bias(model, torch.randn(5, 3))
    assert report.stripped == {}
    assert reason in next(iter(report.left.values()))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_a_shared_norm_keeps_them():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
    assert strip_bias(model, torch.randn(5, 3)).left == {"1": "0, 2 share it, whose biases differ"}


def test_a_network_that_is_not_a_function_is_put_back():
    class Counting(nn.Sequential):
        count = 0

        def forward(self, x):
            self.count += 1
            return super().forward(x) + self.count

    model = Counting(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not the same from run to run"):
        strip_bias(model, torch.randn(5, 3))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
