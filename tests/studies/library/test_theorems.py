"""Both sides of the theorems, calculated another way, and the verdicts of a small run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tolerances import DIFFERENCE, DOUBLE

from batchnorm.studies.library.theorems import STUDY, _after, _draw, _loss, _normalized, measure
from batchnorm.studies.run_study import plan_study, run_studies, settings_of


@pytest.fixture(scope="module")
def net() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return _draw(40)


@pytest.fixture(scope="module")
def sides(net: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in measure(net, _draw(40)["W"]).items()}


def test_the_gradient_is_that_of_the_papers_closed_form(net, sides) -> None:
    y = (net["x"] @ net["W"].T).numpy()
    m, sigma, gamma = len(y), y.std(0), net["gamma"].numpy()
    hat = (y - y.mean(0)) / sigma
    z = torch.tensor(gamma * hat + net["beta"].numpy()).requires_grad_()
    g = torch.autograd.grad(_after(z, net), z)[0].numpy()
    dx = gamma / (m * sigma) * (m * g - g.sum(0) - hat * (g * hat).sum(0))  # [P1] Section 3
    np.testing.assert_allclose(sides["4.1/measured"], (dx**2).sum(0), rtol=DOUBLE)
    printed = (gamma / sigma) ** 2 * (
        (g**2).sum(0) - g.sum(0) ** 2 / m - (g * hat).sum(0) ** 2 / np.sqrt(m)
    )
    np.testing.assert_allclose(sides["4.1/printed"], printed, rtol=DOUBLE)


def test_the_curvature_is_the_change_of_the_gradient(net, sides) -> None:
    y = (net["x"] @ net["W"].T).requires_grad_()

    def gradient(at: torch.Tensor) -> torch.Tensor:
        loss = _after(net["gamma"] * _normalized(at) + net["beta"], net)
        return torch.autograd.grad(loss, at)[0]

    unit, size = 2, 1e-6
    direction = torch.zeros_like(y)
    direction[:, unit] = gradient(y)[:, unit]
    ahead, behind = (
        gradient((y + sign * size * direction).detach().requires_grad_()) for sign in (1, -1)
    )
    curved = ((ahead - behind) * direction).sum() / (2 * size)
    assert sides["4.2/measured"][unit] == pytest.approx(float(curved), rel=1e3 * DIFFERENCE)


def test_the_loss_does_not_know_the_scale_of_a_weight(net) -> None:
    weight = net["W"].clone()
    weight[1] *= 7
    assert float(_loss(net, weight)) == pytest.approx(float(_loss(net, net["W"])), rel=DOUBLE)


def test_printed_bounds_are_violated_and_corrected_ones_are_tight(tmp_path: Path) -> None:
    settings = settings_of(STUDY, "quick", {"trials": 3, "seeds": 2})
    (run,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    verdicts = {verdict.claim: verdict.verdict for verdict in STUDY.verdicts(run)}
    assert verdicts == {
        "4.1-printed": "does not hold",
        "4.1-corrected": "holds",
        "4.2-printed": "holds",
        "4.4-printed": "does not hold",
        "4.4-corrected": "holds",
        "4.5-printed": "holds",
        "4.5-optimum": "holds",
    }
    assert [chart.panels != [] for chart in STUDY.figures(run)] == [True] * 3
