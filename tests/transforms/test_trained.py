"""The verbs on a network whose statistics come from training, on real digits."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.studies.tasks import load_task


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


@pytest.fixture(scope="module")
def snapshots(digits):
    """Networks after 30, 40, 50, 60 steps of one run."""
    torch.manual_seed(0)
    model, states = network(), []
    optimiser = torch.optim.SGD(batchnorm.parameter_groups(model, 5e-4), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 61):
        chosen = torch.randint(len(digits.train), (64,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(digits.train.x[chosen]), digits.train.y[chosen]).backward()
        optimiser.step()
        if step >= 30 and step % 10 == 0:
            states.append(copy.deepcopy(model.state_dict()))
    return states


@pytest.fixture
def model(snapshots):
    model = network().eval()
    model.load_state_dict(snapshots[-1])
    return model


def accuracy(model, examples):
    with torch.no_grad():
        return (model.eval()(examples.x).argmax(1) == examples.y).float().mean().item()


def test_fold_and_strip_bias(model, digits):
    before, x = model(digits.test.x), digits.test.x
    assert accuracy(model, digits.test) > 0.9
    assert set(batchnorm.strip_bias(model, x[:8]).stripped) == {"3", "7"}
    report = batchnorm.fold(model, x[:8])
    assert set(report.folded) == {"1", "4", "8"}
    largest = (model(x) - before).abs().max() / before.abs().max()
    assert largest < tolerances.SINGLE


def test_recalibrate_repairs_statistics_that_are_lost(model, digits):
    right = accuracy(model, digits.test)
    for layer in (model[1], model[4], model[8]):
        layer.reset_running_stats()
    lost = accuracy(model, digits.test)
    batchnorm.recalibrate(model, digits.train.x.split(64))
    repaired = accuracy(model, digits.test)
    assert lost < right - 0.05
    assert repaired > right - 0.02


def test_adapt_to_inverted_digits_and_back(model, digits):
    """Another kind of images: dimmed and off black, which statistics can make up for."""
    clean = accuracy(model, digits.test)
    other = type(digits.test)(0.3 * digits.test.x + 0.6, digits.test.y)
    before = accuracy(model, other)
    adaptation = batchnorm.adapt(model, other.x.split(60), prior=16)
    adapted = accuracy(model, other)
    assert before < clean - 0.1
    assert adapted > before + 0.1
    adaptation.reset()
    assert accuracy(model, other) == before
    entropies = batchnorm.adapt(model, other.x.split(60), entropy_lr=1e-2).entropies
    assert entropies[-1] < entropies[0]


def test_average_needs_recomputed_statistics(snapshots, digits):
    """Weights average well; their statistics do so only where they are measured again."""
    batches = digits.train.x.split(64)
    averaged = {}
    for statistics in ("recompute", "average", "copy"):
        model = network()
        loader = batches if statistics == "recompute" else None
        batchnorm.average(model, snapshots, statistics=statistics, loader=loader)
        averaged[statistics] = F.cross_entropy(
            model.eval()(digits.test.x), digits.test.y
        ).item()  # fmt: skip
        assert accuracy(model, digits.test) > 0.9
    measured = network()
    batchnorm.average(measured, snapshots, statistics="copy")
    batchnorm.recalibrate(measured, batches)
    again = F.cross_entropy(measured.eval()(digits.test.x), digits.test.y).item()
    assert averaged["recompute"] == pytest.approx(again, rel=tolerances.SINGLE)
