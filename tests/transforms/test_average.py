"""Averages against torch's own, and statistics that fit the averaged weights."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.transforms.average import average
from batchnorm.transforms.recalibrate import recalibrate


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    for _ in range(seed + 1):
        model(torch.randn(8, 3, dtype=torch.float64))
    return model


def assert_same(model, other):
    torch.testing.assert_close(
        dict(model.state_dict()),
        dict(other.state_dict()),
        rtol=tolerances.DOUBLE,
        atol=tolerances.DOUBLE,
    )


STATES = [network(seed).state_dict() for seed in range(3)]
DATA = list(torch.randn(3, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def test_equal_weights_are_stochastic_weight_averaging():
    swa = AveragedModel(network(0), use_buffers=True)
    for seed in range(3):
        swa.update_parameters(network(seed))
    model = network(0)
    average(model, STATES, statistics="average")
    expected = swa.module.state_dict()
    expected["1.num_batches_tracked"] = STATES[-1]["1.num_batches_tracked"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE
        )


def test_an_exponential_moving_average_over_itself():
    model, by_hand = network(0), copy.deepcopy(STATES[0])
    for state in STATES[1:]:
        average(model, [model.state_dict(), state], [0.9, 0.1], statistics="average")
        for name, value in by_hand.items():
            by_hand[name] = (
                0.9 * value + 0.1 * state[name] if value.is_floating_point() else state[name]
            )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, by_hand[name], rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE
        )


def test_copy_and_recompute():
    model = network(0)
    average(model, STATES, statistics="copy")
    assert torch.equal(model[1].running_mean, STATES[-1]["1.running_mean"])
    recomputed = network(0)
    average(recomputed, STATES, loader=DATA)
    recalibrate(model, DATA)
    assert_same(recomputed, model)
    torch.testing.assert_close(
        recomputed[1].running_mean, recomputed[0](torch.cat(DATA)).mean(0).detach()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": "median"}, "one of recompute, average, copy, got 'median'"),
        ({}, "'recompute' needs a loader"),
        ({"statistics": "copy", "loader": DATA}, "got 'copy' and loader="),
        ({"statistics": "copy", "weights": [1.0]}, "weights must be 3 numbers"),
        ({"statistics": "copy", "weights": [0, 0, 0]}, "weights must be 3 numbers"),
        ({"loader": []}, "the loader yielded no batch"),
        ({"snapshots": [], "statistics": "copy"}, "no snapshot"),
        (
            {"snapshots": [STATES[0], {}], "statistics": "copy"},
            "snapshot 1 is of another network: 0.bias, 0.weight",
        ),
    ],
    ids=range(8),
)
def test_failing_changes_nothing(options, message):
    model = network(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        average(model, **{"snapshots": STATES} | options)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
