"""What evaluation normalises by, against layers' own buffers and numpy."""

import numpy as np
import pytest
import torch
from tests import tolerances
from torch import nn
from torch.nn import functional as F

from batchnorm.probes import Population, Step, TestBatches, observe
from batchnorm.probes.inference import _batches


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )  # fmt: skip


def step_of(model: nn.Module, number: int, x: torch.Tensor) -> Step:
    y = torch.zeros(len(x), dtype=torch.int64)
    return Step(number, model, [], x, y, F.cross_entropy, 0.1, torch.get_rng_state())


def test_averages_are_those_that_layers_of_that_momentum_keep() -> None:
    model = network()
    momenta = (0.1, 0.03, None)
    twins = {m: network() for m in momenta}
    for momentum, twin in twins.items():
        for layer in twin:
            if isinstance(layer, nn.BatchNorm1d):
                layer.momentum = momentum
    test = torch.randn(40, 4), torch.randint(3, (40,))
    probe = Population(momenta, {4}, [test[0]], test, F.cross_entropy)
    for number in range(5):
        x = 2 * torch.randn(10, 4) + 1
        step = step_of(model, number, x)
        for twin in twins.values():
            torch.manual_seed(number)
            twin(x)
        torch.manual_seed(number)
        with observe(probe.modules(model, [])) as step.seen:
            model(x)
        found = {r.quantity: r.value for r in probe.before_update(step)}
        assert bool(found) == (number == 4)
    # The model's own layers have torch's default momentum; measuring has not moved them.
    for name, value in twins[0.1].state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    for momentum, twin in twins.items():
        twin.eval()
        loss = float(F.cross_entropy(twin(test[0]), test[1]).detach())
        name = f"running-{'cumulative' if momentum is None else momentum}"
        assert found[f"{name}/loss"] == pytest.approx(loss, rel=tolerances.LIKE_TORCH)
    assert len({found[f"running-{m}/loss"] for m in (0.1, 0.03, "cumulative")}) == 3


def test_recomputed_statistics_are_algorithm_2_and_pooled() -> None:
    model, _, _ = one_layer()
    first, second = 2 * torch.randn(8, 3) - 1, torch.randn(8, 3) + 2
    test = torch.randn(20, 3), torch.randint(3, (20,))
    probe = Population((), {0}, [first, second], test, F.cross_entropy)
    step = step_of(model[:1], 0, first)
    found = {r.quantity: r.value for r in probe.before_update(step)}
    parts = [part.double().numpy() for part in (first, second)]
    values = np.concatenate(parts)
    variances = {
        "algorithm2": 8 / 7 * np.mean([part.var(0) for part in parts], axis=0),
        "pooled": values.var(0, ddof=1),
    }
    for name, var in variances.items():
        logits = (test[0].double().numpy() - values.mean(0)) / np.sqrt(var + 1e-5)
        expected = cross_entropy(logits, test[1])
        assert found[f"{name}/loss"] == pytest.approx(expected, rel=tolerances.SINGLE)
    assert abs(found["pooled/loss"] - found["algorithm2/loss"]) > 0.01


def test_a_probe_goes_on_from_its_state() -> None:
    model, test = network(), (torch.randn(8, 4), torch.randint(3, (8,)))
    probes = [Population((0.1, None), {1}, [test[0]], test, F.cross_entropy) for _ in range(2)]
    x = torch.randn(10, 4)

    def measured(probe: Population, number: int) -> list[float]:
        step = step_of(model, number, x + number)
        with observe(probe.modules(model, [])) as step.seen:
            torch.manual_seed(number)
            model(step.x)
        return [record.value for record in probe.before_update(step)]

    measured(probes[0], 0)
    probes[1].load_state_dict(probes[0].state_dict())
    once = measured(probes[1], 1)
    probes[0] = Population((0.1, None), {1}, [test[0]], test, F.cross_entropy)
    measured(probes[0], 0)
    assert measured(probes[0], 1) == once


def test_batches_have_one_size_and_every_example_is_predicted_once() -> None:
    parts = [(batch.tolist(), again) for batch, again in _batches(torch.arange(7), 3)]
    assert parts == [([0, 1, 2], 0), ([3, 4, 5], 0), ([4, 5, 6], 2)]
    assert [batch.tolist() for batch, _ in _batches(torch.arange(4), 2)] == [[0, 1], [2, 3]]


def one_layer() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    for layer in model:
        layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([2.0, 0.5, 1.0]))
    return model, 3 * torch.randn(6, 3, dtype=torch.float64).float() + 1, torch.randint(3, (6,))


def cross_entropy(logits: np.ndarray, y: torch.Tensor) -> float:
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y.numpy()].mean())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_predictions_by_test_batch_against_numpy(size: int) -> None:
    model, x, y = one_layer()
    prior = 4
    probe = TestBatches({"set": (x, y)}, {0}, (1, 2, 3, 50), (2, 3), F.cross_entropy, prior=prior)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {r.quantity: r.value for r in probe.before_update(step_of(model, 0, x))}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(layer.training for layer in model)

    mean, var = np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.5, 1.0])
    share = size / (prior + size)

    def normalised(values: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        return (values - m) / np.sqrt(v + 1e-5)

    ways: dict[str, list[np.ndarray]] = {"batch": [], "mixture": [], "adapted": []}
    for part in np.split(x.double().numpy(), 6 // size):
        mixed = alone = own = part
        for _ in range(2):
            m, v = own.mean(0), own.var(0)
            own = normalised(own, m, v)
            # Measured with the batch alone, with an unbiased variance, and mixed afterwards.
            if size > 1:
                unbiased = v * size / (size - 1)
                alone = normalised(
                    alone, (1 - share) * mean + share * m, (1 - share) * var + share * unbiased
                )
            m, v = mixed.mean(0), mixed.var(0)
            mixed = normalised(mixed, (1 - share) * mean + share * m, (1 - share) * var + share * v)
        for way, values in zip(ways, (own, mixed, alone), strict=True):
            ways[way].append(values)
    for way, parts in ways.items():
        if size == 1 and way != "mixture":
            assert f"set/{way}-1/loss" not in found  # a single value has no variance
        else:
            expected = cross_entropy(np.concatenate(parts), y)
            assert found[f"set/{way}-{size}/loss"] == pytest.approx(expected, rel=tolerances.SINGLE)
    assert "set/batch-50/loss" not in found
    running = normalised(normalised(x.double().numpy(), mean, var), mean, var)
    assert found["set/running/loss"] == pytest.approx(
        cross_entropy(running, y), rel=tolerances.SINGLE
    )
