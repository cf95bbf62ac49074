"""Loss and accuracy against numpy, in evaluation mode."""

import numpy as np
import pytest
import torch
from tests import tolerances
from torch import nn
from torch.nn import functional as F

from batchnorm import probes
from batchnorm.probes.step import Step
from batchnorm.studies.tasks import load_task


def step_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    return Step(4, model, [], x, y, F.cross_entropy, 0.1, torch.get_rng_state(), loss=1.25)


def test_batch_loss_is_what_training_saw() -> None:
    (record,) = probes.BatchLoss().before_update(
        step_of(nn.Identity(), torch.ones(1), torch.ones(1))
    )
    assert (record.step, record.quantity, record.value) == (4, "batch/loss", 1.25)


@pytest.mark.parametrize("examples", [7, 1203])  # less than a chunk; not a multiple of one
def test_classification(examples: int) -> None:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((examples, 5)), random.integers(0, 3, examples)
    weight, mean, var = random.standard_normal((3, 5)), random.standard_normal(5), random.random(5)
    model = nn.Sequential(nn.BatchNorm1d(5, eps=0), nn.Dropout(0.5), nn.Linear(5, 3, bias=False))
    model[0].running_mean.copy_(torch.tensor(mean))
    model[0].running_var.copy_(torch.tensor(var))
    model[2].weight.data = torch.tensor(weight, dtype=torch.float32)
    tensors = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    probe = probes.Performance({"test": tensors}, F.cross_entropy)
    found = {r.quantity: r.value for r in probe.before_update(step_of(model, *tensors))}

    logits = ((x - mean) / np.sqrt(var)) @ weight.T
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert found["test/loss"] == pytest.approx(
        -log_p[np.arange(examples), y].mean(), rel=tolerances.SINGLE
    )
    assert found["test/accuracy"] == pytest.approx(
        (logits.argmax(1) == y).mean(), abs=tolerances.SINGLE
    )
    assert all(module.training for module in model.modules())


def test_regression_is_the_squared_error_per_example() -> None:
    task = load_task("gaussian")
    probe = probes.Performance({"test": (task.test.x, task.test.y)}, task.loss)
    model = nn.Linear(10, 10, bias=False)
    (record,) = probe.before_update(step_of(model, task.test.x, task.test.y))
    x, y = task.test.x.double().numpy(), task.test.y.double().numpy()
    error = x @ model.weight.detach().double().numpy().T - y
    expected = (error**2).sum(1).mean()
    assert record.quantity == "test/loss"
    assert record.value == pytest.approx(expected, rel=tolerances.SINGLE)


def test_constant_loss_is_that_of_the_best_constant_answer() -> None:
    digits, gaussian = load_task("digits"), load_task("gaussian")
    counts = torch.bincount(digits.train.y)
    logits = counts.double().log().expand(len(digits.train), 10)
    expected = F.cross_entropy(logits, digits.train.y)
    assert digits.constant_loss() == pytest.approx(float(expected), rel=tolerances.SINGLE)
    y = gaussian.train.y.double()
    expected = gaussian.loss(y.mean(0).expand_as(y), y) / len(y)
    assert gaussian.constant_loss() == pytest.approx(float(expected), rel=tolerances.SINGLE)
