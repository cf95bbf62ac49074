"""Each probe against closed forms in numpy on a deep linear network, where they are short.

f(x) = W₃W₂W₁x, L = Σ‖f(x) − y‖²; with r = f(x) − y:
∂L/∂W_i = 2 (W₃…W_{i+1})ᵀ r (W_{i−1}…W₁x)ᵀ.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests import tolerances

from batchnorm import probes
from batchnorm.probes.activations import BINS, histogram
from batchnorm.probes.step import Observation, Step

Array = NDArray[np.float64]
LR = 1e-3


class Linear:
    """The same network in numpy."""

    def __init__(self, weights: list[Array], x: Array, y: Array) -> None:
        self.weights, self.x, self.y = weights, x, y

    def product(self, first: int, last: int) -> Array:
        result = np.eye(self.weights[0].shape[0])
        for weight in self.weights[first:last]:
            result = weight @ result
        return result

    def residual(self) -> Array:
        return self.product(0, 3) @ self.x.T - self.y.T

    def loss(self) -> float:
        return float((self.residual() ** 2).sum())

    def gradient(self, i: int) -> Array:
        return 2 * self.product(i + 1, 3).T @ self.residual() @ (self.product(0, i) @ self.x.T).T

    def gradients(self) -> list[Array]:
        return [self.gradient(i) for i in range(3)]

    def moved(self, change: list[Array]) -> "Linear":
        return Linear([w + c for w, c in zip(self.weights, change, strict=True)], self.x, self.y)


@pytest.fixture
def numpy_network() -> Linear:
    random = np.random.default_rng(0)
    weights = [random.standard_normal((4, 4)) / 2 for _ in range(3)]
    x = random.standard_normal((20, 4))
    return Linear(weights, x, x @ random.standard_normal((4, 4)).T)


@pytest.fixture
def step(numpy_network: Linear) -> Step:
    layers = [torch.nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(3)]
    model = torch.nn.Sequential(*layers)
    for layer, weight in zip(layers, numpy_network.weights, strict=True):
        layer.weight.data = torch.tensor(weight)
    x, y = torch.tensor(numpy_network.x), torch.tensor(numpy_network.y)

    def loss_function(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).square().sum()

    gradients = numpy_network.gradients()
    names = [f"{i}.weight" for i in range(3)]
    return Step(
        number=7,
        model=model,
        layers=probes.find_layers(model, x[:2]),
        x=x,
        y=y,
        loss_function=loss_function,
        lr=LR,
        random_state=torch.get_rng_state(),
        loss=numpy_network.loss(),
        parameters={n: p.detach().clone() for n, p in model.named_parameters()},
        gradients=dict(zip(names, map(torch.tensor, gradients), strict=True)),
        updated={
            n: torch.tensor(w - LR * g)
            for n, w, g in zip(names, numpy_network.weights, gradients, strict=True)
        },
    )


def measured(records) -> dict[tuple[str, str], float]:
    return {(r.layer, r.quantity): r.value for r in records}


def test_loss_and_gradients_are_those_of_the_formula(step: Step, numpy_network: Linear) -> None:
    loss, gradients = step.loss_and_gradients(step.parameters)
    assert loss == pytest.approx(numpy_network.loss(), rel=tolerances.DOUBLE)
    for i, expected in enumerate(numpy_network.gradients()):
        np.testing.assert_allclose(gradients[f"{i}.weight"], expected, rtol=tolerances.DOUBLE)


def test_gradient_norms(step: Step, numpy_network: Linear) -> None:
    found = measured(probes.Gradients().before_update(step))
    for i, expected in enumerate(numpy_network.gradients()):
        assert found[str(i), "gradient/norm"] == pytest.approx(
            np.linalg.norm(expected), rel=tolerances.DOUBLE
        )


def test_shift_is_definition_2_1(step: Step, numpy_network: Linear) -> None:
    found = measured(probes.Shift().after_update(step))
    change = [-LR * g for g in numpy_network.gradients()]
    for i in range(3):
        earlier = [c if j < i else np.zeros_like(c) for j, c in enumerate(change)]
        before, after = numpy_network.gradient(i), numpy_network.moved(earlier).gradient(i)
        cosine = (before * after).sum() / np.linalg.norm(before) / np.linalg.norm(after)
        distance = np.linalg.norm(before - after)
        assert found[str(i), "shift/l2"] == pytest.approx(distance, rel=tolerances.DIFFERENCE)
        assert found[str(i), "shift/cosine"] == pytest.approx(cosine, rel=tolerances.DOUBLE)
    assert found["0", "shift/l2"] == 0
    assert found["2", "shift/l2"] > 0


def test_landscape_is_figure_4(step: Step, numpy_network: Linear) -> None:
    found = measured(probes.Landscape(5, 0.5, 4.0).before_update(step))
    here = numpy_network.gradients()
    length = np.sqrt(sum((g**2).sum() for g in here))
    losses, distances, smoothness = [], [], []
    for multiple in (0.5, 0.5 * 8**0.25, 0.5 * 8**0.5, 0.5 * 8**0.75, 4.0):
        there = numpy_network.moved([-multiple * LR * g for g in here])
        distance = np.sqrt(
            sum(((a - b) ** 2).sum() for a, b in zip(here, there.gradients(), strict=True))
        )
        losses.append(there.loss())
        distances.append(distance)
        smoothness.append(distance / (multiple * LR * length))
    expected = {
        "loss_low": min(losses),
        "loss_high": max(losses),
        "gradient_low": min(distances),
        "gradient_high": max(distances),
        "smoothness": max(smoothness),
    }
    assert len(found) == len(expected)
    for quantity, value in expected.items():
        assert found["", f"landscape/{quantity}"] == pytest.approx(value, rel=tolerances.DIFFERENCE)


def test_landscape_keeps_an_overflow_visible(step: Step) -> None:
    step.lr = 1e200
    found = measured(probes.Landscape(2, 0.5, 4.0).before_update(step))
    assert not np.isfinite(found["", "landscape/loss_high"])


def test_landscape_costs_one_pass_a_point_and_one_copy(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []  # kept, so that no other tensor can get their memory
    forward = step.model.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        seen.append([value.detach() for value in step.model.parameters()])
        return forward(x)

    own = {value.data_ptr() for value in step.model.parameters()}
    monkeypatch.setattr(step.model, "forward", counted)
    list(probes.Landscape(6).before_update(step))
    assert len(seen) == 6
    places = [{value.data_ptr() for value in parameters} for parameters in seen]
    assert all(place == places[0] for place in places)
    assert not places[0] & own


def test_weights(step: Step, numpy_network: Linear) -> None:
    found = measured(probes.Weights().before_update(step))
    for i, weight in enumerate(numpy_network.weights):
        squared = (weight**2).sum()
        assert found[str(i), "weight/norm"] == pytest.approx(squared**0.5, rel=tolerances.DOUBLE)
        assert found[str(i), "weight/effective_lr"] == pytest.approx(
            LR / squared, rel=tolerances.DOUBLE
        )


def test_activations(step: Step, numpy_network: Linear) -> None:
    outputs = [numpy_network.product(0, i + 1) @ numpy_network.x.T for i in range(3)]
    step.seen = {
        layer.site: Observation(step.x, torch.tensor(out.T, dtype=torch.float32))
        for layer, out in zip(step.layers, outputs, strict=True)
    }
    found = measured(probes.Activations().before_update(step))
    for i, out in enumerate(outputs):
        expected = {
            "mean": out.mean(),
            "std": out.std(),
            "low": out.min(),
            "high": out.max(),
            "p15": np.percentile(out[0], 15),
            "p50": np.percentile(out[0], 50),
            "p85": np.percentile(out[0], 85),
        }
        for name, value in expected.items():
            assert found[str(i), f"activation/{name}"] == pytest.approx(
                value, rel=tolerances.SINGLE, abs=tolerances.SINGLE
            )


def test_activations_of_a_convolution_take_positions_as_examples() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3))
    values = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(5, 1, 6, 6)
    step = Step(0, model, probes.find_layers(model, x), x, x, torch.dot, LR, torch.get_rng_state())
    step.seen = {model[0]: Observation(x, values)}
    found = measured(probes.Activations().before_update(step))
    assert found["0", "activation/p50"] == pytest.approx(
        np.percentile(values[:, 0].numpy(), 50), rel=tolerances.SINGLE
    )


def test_histogram_counts_every_value_once() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    shares, low, high = histogram(values)
    counts, _ = np.histogram(values.numpy(), BINS, (low, high))
    np.testing.assert_allclose(shares.numpy() * 1000, counts, atol=tolerances.SINGLE)
    constant, low, high = histogram(torch.full((10,), 3.0))
    assert constant.sum() == 1
    assert low < 3 < high


def test_running(numpy_network: Linear) -> None:
    random = np.random.default_rng(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    values = random.standard_normal((20, 3)) * 2 + 1
    running_mean, running_var = random.standard_normal(3), random.random(3) + 0.5
    model[1].running_mean.copy_(torch.tensor(running_mean))
    model[1].running_var.copy_(torch.tensor(running_var))
    x = torch.zeros(20, 4)
    layers = probes.find_layers(model, x)
    step = Step(0, model, layers, x, x, torch.dot, LR, torch.get_rng_state())
    seen = torch.tensor(values, dtype=torch.float32)
    step.seen = {model[1]: Observation(seen, seen)}
    found = measured(probes.Running().before_update(step))
    mean, var = values.mean(0), values.var(0, ddof=1)
    error = np.sqrt(((running_mean - mean) ** 2 / var).mean())
    assert found["0", "running/mean_error"] == pytest.approx(error, rel=tolerances.SINGLE)
    assert found["0", "running/log_variance_ratio"] == pytest.approx(
        np.log(running_var / var).mean(), rel=tolerances.SINGLE
    )
