"""The effects of norms on curves made up for it, and a run of a few steps."""

import math
from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.studies.library.norms import (
    ORDERS,
    OTHERS,
    STUDY,
    _l2_differs,
    _losses,
    _shares,
    _smoother,
    arms,
)
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError

ACCURACY = {
    "none": 0.2,
    "batch": 0.6,
    "l1": 0.5,
    "l2": 0.4,
    "linf": 0.7,
    "layer": 0.1,
    "group": 0.3,
    "weight": 0.2,
}


def made(norm, level):
    return cell(
        norm,
        {
            "train/accuracy": {0: level, 10: level},
            "batch/loss": {0: 1.0, 10: 1 / level},
            "landscape/gradient_high": {0: 1 / level},
        },
    )


def test_effects() -> None:
    everything = run(*(made(norm, level) for norm, level in ACCURACY.items()))
    assert _shares(everything, ORDERS, min) == pytest.approx({0: 0.5})
    assert _shares(everything, OTHERS, max) == pytest.approx({0: 0.25})
    assert _smoother(everything) == pytest.approx({0: 2.0})
    assert _losses(everything, lambda v: v["batch"] / v["l1"]) == pytest.approx({0: 0.5 / 0.6})
    assert _l2_differs(everything) == pytest.approx({0: math.log(0.6 / 0.4)})
    with pytest.raises(CannotTellError, match="not all of the arms l1, l2, linf"):
        _smoother(run(made("none", 0.2), made("batch", 0.5), made("l1", 0.5)))


def test_seeds_that_lack_an_arm_are_left_out() -> None:
    cells = [made(norm, level) for norm, level in ACCURACY.items()]
    lonely = cell("none", {"train/accuracy": {0: 0.1, 10: 0.1}}, seed=1)
    assert set(_shares(run(*cells, lonely), ORDERS, min)) == {0}


def test_both_arms_of_the_comparison_are_needed(tmp_path: Path) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "quick", {"norm": ("batch", "l1")}), tmp_path / "r")
    with pytest.raises(SettingsError, match="none is not among them"):
        run_studies([plan], tmp_path)


def test_a_short_run_is_judged_and_drawn_for_every_arm(tmp_path: Path) -> None:
    changes = {"steps": 4, "every": 2, "linear_steps": 4, "seeds": 2, "landscape_points": 2}
    settings = settings_of(STUDY, "quick", changes)
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    assert {c.settings["norm"] for c in done.cells} == {"none", "batch", *ORDERS, *OTHERS}
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    for claim in ("smooth", "linear-orders", "linear-comparable", "linear-l1", "l2-is-not-batch"):
        assert set(verdicts[claim].effects) == {0, 1}, verdicts[claim].note
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn


def test_a_network_of_your_own_has_no_standardised_weights_unless_asked_for() -> None:
    own = settings_of(STUDY, "quick", {"model": "my_module:network"})
    assert arms(own) == ("none", "batch", "l1", "l2", "linf", "layer", "group")
    assert arms(settings_of(STUDY, "quick", {})) == (*arms(own), "weight")
    assert arms(settings_of(STUDY, "quick", {"norm": ("none", "batch")})) == ("none", "batch")
