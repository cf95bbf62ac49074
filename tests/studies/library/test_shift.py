"""The effects of shift on curves made up for it, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.studies.library.shift import STUDY, _cosine, _distance, _turned
from batchnorm.studies.run_study import plan_study, run_studies, settings_of

LAYERS = ("first", "second", "third")


def measured(norm, distance, cosine):
    series = {f"first:shift/{name}": {0: 100.0, 1: 100.0} for name in ("l2", "cosine")}
    for layer, l2, angle in zip(LAYERS[1:], distance, cosine, strict=True):
        series[f"{layer}:shift/l2"] = dict(enumerate(l2))
        series[f"{layer}:shift/cosine"] = dict(enumerate(angle))
    return cell(norm, series, layers=LAYERS)


def test_effects_leave_the_first_layer_out() -> None:
    plain = measured("none", [(1, 2), (3, 4)], [(1.0, 0.9), (0.9, 0.8)])
    normed = measured("batch", [(5, 5), (5, 6)], [(0.1, 0.2), (0.1, float("nan"))])
    both = run(plain, normed)
    assert _distance(both) == {0: 2.0}
    assert _turned(both) == pytest.approx({0: 0.9 - 0.1})
    assert _cosine(both, "none") == pytest.approx({0: 0.9})


def test_a_short_run_is_judged_and_drawn_for_both_networks(tmp_path: Path) -> None:
    settings = settings_of(STUDY, "quick", {"steps": 4, "every": 2, "linear_steps": 4, "seeds": 2})
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    assert all(set(verdict.effects) == {0, 1} for verdict in STUDY.verdicts(done))
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn
