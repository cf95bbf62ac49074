"""The effects of noise on curves made up for it, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.studies.library.noise import STUDY, _gain, _prevented, _share
from batchnorm.studies.measures import instability
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.verdicts import CannotTellError


def learning(norm, *accuracies):
    """An accuracy every 10 of 90 steps, so that the first third ends at step 30."""
    return cell(norm, {"train/accuracy": {10 * i: a for i, a in enumerate(accuracies)}}, steps=90)


def test_gain_is_over_the_first_third() -> None:
    plain, normed = learning("none", 0, 0, 0, 0, 1), learning("batch", 0.4, 0.4, 0.4, 0.4)
    noisy = learning("noisy", 0.0, 0.3, 0.3, 0.3, 0.9)
    # Trapezoids: (0.15 + 0.3 + 0.3) / 3.
    assert _gain(run(plain, normed, noisy)) == pytest.approx({0: 0.25})
    assert _share(run(plain, normed, noisy)) == pytest.approx({0: 0.25 / 0.4})
    with pytest.raises(CannotTellError, match="gains nothing"):
        _share(run(learning("none", 1, 1), learning("batch", 0, 0), learning("noisy", 0, 0)))


def test_instability_is_in_widths_of_the_distribution() -> None:
    moving = {
        "hidden:activation/p15": {0: -1.0, 1: -1.0, 2: 0.0},
        "hidden:activation/p50": {0: 0.0, 1: 1.0, 2: 1.5},
        "hidden:activation/p85": {0: 1.0, 1: 3.0, 2: 2.0},
    }
    # Moves of 1 and 0.5 over widths of 4 and 2.
    assert instability(cell("noisy", moving, layers=("hidden", "output"))) == 0.25


def test_what_the_noise_alone_leaves_of_learning() -> None:
    both = run(learning("none", 0.1, 0.6), learning("noise", 0.1, 0.15))
    assert _prevented(both) == pytest.approx({0: 0.1})
    with pytest.raises(CannotTellError, match="does not learn either"):
        _prevented(run(learning("none", 0.1, 0.1), learning("noise", 0.1, 0.1)))


def test_a_short_run_is_judged_and_drawn(tmp_path: Path) -> None:
    settings = settings_of(STUDY, "quick", {"steps": 12, "every": 2, "seeds": 2})
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    assert set(verdicts["less-stable-than-batch"].effects) == {0, 1}
    assert all(effect > 1 for effect in verdicts["less-stable-than-batch"].effects.values())
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn
