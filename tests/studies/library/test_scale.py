"""The identities against a closed form, and a short run against what is known of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.studies.library.made_up import cell, run
from tests.tolerances import DOUBLE

from batchnorm.records import Run
from batchnorm.studies.library.scale import STUDY, _angle_off, _growth, _remembered
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.scale_invariance import scaled
from batchnorm.studies.settings import SettingsError


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_output_and_gradients_are_the_papers_closed_form(eps: float) -> None:
    torch.manual_seed(0)
    u, weight, towards = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((9, 4), (3, 4), (9, 3))
    )
    y, by_input, by_weight = (found.numpy() for found in scaled(u, weight, towards, 0.5, eps))
    x, dy, m = (u @ weight.T).numpy() / 2, towards.numpy(), 9
    sigma = np.sqrt(x.var(0) + eps)
    hat = (x - x.mean(0)) / sigma
    dx = (m * dy - dy.sum(0) - hat * (dy * hat).sum(0)) / (m * sigma)  # [P1] Section 3
    np.testing.assert_allclose(y, hat, rtol=DOUBLE, atol=DOUBLE)
    np.testing.assert_allclose(by_input, dx @ weight.numpy() / 2, rtol=DOUBLE, atol=DOUBLE)
    np.testing.assert_allclose(by_weight, dx.T @ u.numpy(), rtol=DOUBLE, atol=DOUBLE)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("scale") / "run"
    settings = settings_of(STUDY, "quick", {"steps": 100, "weight_decay": 0.5, "seeds": 2})
    (done,), interrupted = run_studies([plan_study(STUDY, settings, out)], out)
    assert not interrupted
    return done


def test_a_short_run_is_judged_and_drawn(short: Run) -> None:
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(short)}
    exact = ("output", "input-gradient", "weight-gradient", "epsilon", "right-angle")
    assert {verdicts[name].verdict for name in exact} == {"holds"}
    assert all(verdict.effects for verdict in verdicts.values())
    drawn = {chart.id for chart in STUDY.figures(short) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn


def test_epsilon_matters_where_the_weights_are_small(short: Run) -> None:
    series = short.by_seed(line="identities")[0].series("identity/output with epsilon")
    assert series[0] > 0.1  # a = 0.001: a²σ² is of the size of ε
    assert series[24] < 1e-9  # a = 1000


def test_without_decay_weights_only_grow_and_with_it_they_shrink_to_their_equilibrium(
    short: Run,
) -> None:
    free = list(short.by_seed(line="free")[0].series("scale/norm").values())
    assert free == sorted(free)
    large = list(short.by_seed(line="decay-large")[0].series("scale/norm").values())
    assert large[-1] < large[0]


def line(way: str, **series: list[float]):
    """Values at steps 1, 2, …"""
    named = {f"scale/{name}": dict(enumerate(values, start=1)) for name, values in series.items()}
    return cell("", named, line=way, lr=0.1, weight_decay=0.05)


def test_the_effects_of_curves_made_up_for_them() -> None:
    assert _growth(run(line("free", norm=[1, 2, 3, 3.5]))) == pytest.approx({0: 0.25})
    # √(2 · 0.1 · 0.05) = 0.1; only the last third counts.
    turning = run(line("decay", angle=[9, 9, 9, 9, 0.11, 0.11]))
    assert _angle_off(turning) == pytest.approx({0: 0.1})
    both = run(line("free", effective_lr=[1, 1, 6]), line("free-large", effective_lr=[0.1, 0.1, 3]))
    assert _remembered(both, "free") == pytest.approx({0: 2})


def test_a_run_too_short_for_the_equilibrium_is_refused(tmp_path: Path) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "quick", {"weight_decay": 0.001}), tmp_path)
    with pytest.raises(SettingsError, match="Give at least 50000"):
        run_studies([plan], tmp_path)
