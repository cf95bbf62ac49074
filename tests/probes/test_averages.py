"""Averages of weights against closed forms, and gradients of parts against autograd's own."""

import pytest
import torch
from tests import tolerances
from torch import nn
from torch.nn import functional as F

from batchnorm.probes import Accumulation, Averages, Step
from batchnorm.transforms.recalibrate import recalibrate

TEST = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
BATCHES = [2 * TEST[0][:15] + 1, TEST[0][15:]]


def network(weight: float, mean: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.copy_(weight * torch.tensor([[1.0, 0.5], [-0.5, 1.0]]))
        model[0].bias.fill_(weight)
    model[1].running_mean.fill_(mean)
    model[1].running_var.fill_(mean**2 + 1)
    model[1].num_batches_tracked.fill_(int(mean))
    return model


def step_of(model: nn.Module, number: int, x=TEST[0], y=TEST[1]) -> Step:
    return Step(number, model, [], x, y, F.cross_entropy, 0.1, torch.get_rng_state())


def loss(weight: float, mean: float, var: float | None = None) -> float:
    """With these statistics, or with recomputed ones."""
    model = network(weight, mean)
    if var is None:
        recalibrate(model, BATCHES)
    else:
        model[1].running_var.fill_(var)
    return F.cross_entropy(model.eval()(TEST[0]), TEST[1]).item()


def taken(snapshots: set[int], weights: tuple[float, ...]) -> tuple[Averages, nn.Module]:
    """After updates that led to these weights, with running means of ten times as much."""
    probe = Averages(0.75, snapshots, {len(weights)}, BATCHES, TEST, F.cross_entropy)
    model = network(0.0, 0.0)
    for number, weight in enumerate(weights):
        model = network(weight, 10 * weight)
        assert not list(probe.before_update(step_of(model, number)))
        assert not list(probe.after_update(step_of(model, number)))
    return probe, model


def test_each_average_with_each_kind_of_statistics() -> None:
    probe, model = taken({2, 3}, (1.0, 2.0, 4.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {r.quantity: r.value for r in probe.before_update(step_of(model, 3))}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())

    # Variances are 10²w² + 1.
    ema, ema_var = (
        0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4,
        0.75 * (0.75 * 101 + 0.25 * 401) + 400.25,
    )
    expected = {
        "last/copy": loss(4, 40, 1601),
        "last/recompute": loss(4, 40),
        "ema/copy": loss(ema, 40, 1601),
        "ema/average": loss(ema, 10 * ema, ema_var),
        "ema/recompute": loss(ema, 0),
        "swa/copy": loss(3, 40, 1601),
        "swa/average": loss(3, 30, (401 + 1601) / 2),
        "swa/recompute": loss(3, 0),
    }
    assert {name for name in found if name.endswith("/loss")} == {f"{n}/loss" for n in expected}
    for name, value in expected.items():
        assert found[f"{name}/loss"] == pytest.approx(value, rel=tolerances.LIKE_TORCH), name
    assert len({round(found[f"ema/{s}/loss"], 4) for s in ("copy", "average", "recompute")}) == 3


def test_averages_go_on_from_their_state() -> None:
    whole, model = taken({2, 3}, (1.0, 2.0, 4.0))
    begun, _ = taken({2, 3}, (1.0, 2.0))
    again = Averages(0.75, {2, 3}, {3}, BATCHES, TEST, F.cross_entropy)
    again.load_state_dict(begun.state_dict())
    list(again.after_update(step_of(model, 2)))
    assert list(again.before_update(step_of(model, 3))) == list(
        whole.before_update(step_of(model, 3))
    )


@pytest.mark.parametrize("regression", [False, True])
def test_accumulated_gradients(regression: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    x = torch.randn(12, 3)
    y = torch.randn(12, 2) if regression else torch.randint(2, (12,))

    def loss_function(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if regression:
            return (output - target).square().sum()
        return F.cross_entropy(output, target)

    step = Step(0, model, [], x, y, loss_function, 0.1, torch.get_rng_state())
    found = {r.quantity: r.value for r in Accumulation(4, {0}).before_update(step)}
    assert found["accumulation/ghost"] <= tolerances.DOUBLE
    assert found["accumulation/still"] <= tolerances.DOUBLE
    assert model.training
    assert type(model[1]) is nn.BatchNorm1d
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())

    # By hand: the parts normalised by their own moments, against all by theirs.
    weights = [p.detach().double().requires_grad_() for p in model.parameters()]

    def gradient(parts: int) -> torch.Tensor:
        first, bias, gamma, beta, second, last = weights
        hidden = x.double() @ first.T + bias
        hat = torch.cat(
            [
                (part - part.mean(0)) / (part.var(0, correction=0) + 1e-5).sqrt()
                for part in hidden.chunk(parts)
            ]
        )
        output = (hat * gamma + beta) @ second.T + last
        target = y.double() if regression else y
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss_function(output, target), weights)]
        )

    accumulated = gradient(3)
    expected = float((gradient(1) - accumulated).norm() / accumulated.norm())
    assert found["accumulation/whole"] == pytest.approx(expected, rel=tolerances.DIFFERENCE)
    assert expected > 0.1


def test_a_subclass_that_may_do_more_is_refused() -> None:
    class Activated(nn.BatchNorm1d):
        pass

    step = step_of(nn.Sequential(Activated(2)), 0)
    with pytest.raises(ValueError, match="Activated cannot normalise in parts"):
        list(Accumulation(5, {0}).before_update(step))
