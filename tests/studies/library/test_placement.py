"""The effects of placement on numbers made up for them, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.studies.library.placement import NETWORKS, STUDY, _gain, _less, _steadier, _zeros
from batchnorm.studies.run_study import plan_study, run_studies, settings_of

LAYERS = ("first", "second", "output")


def placed(placement, series):
    return cell("batch", series, layers=LAYERS, model="mlp", placement=placement)


def test_the_shapes_are_those_of_hidden_layers_in_the_usual_place() -> None:
    series = {
        "first:shape/input_skewness": {0: 100.0, 10: 100.0},  # the data
        "output:shape/output_skewness": {0: 100.0, 10: 100.0},
        "second:shape/input_skewness": {0: 1.0, 10: 2.0},
        "second:shape/output_skewness": {0: 0.25, 10: 0.75},
        "second:shape/input_zeros": {0: 0.5, 10: 0.7},
        "second:shape/output_zeros": {0: 0.0, 10: 0.1},
    }
    other = {name: dict.fromkeys(values, 9.0) for name, values in series.items()}
    both = run(placed(None, series), placed("after", other))
    assert _less(both, "mlp", "skewness") == pytest.approx({0: 3.0})
    assert _zeros(both, "mlp") == pytest.approx({0: 0.55})


def test_what_is_compared_between_the_places() -> None:
    def of(placement, move, accuracy):
        series = {
            f"{layer}:activation/{name}": {0: at, 10: at + move}
            for layer in LAYERS
            for name, at in (("p15", -1.0), ("p50", 0.0), ("p85", 1.0))
        }
        return placed(placement, series | {"train/accuracy": {0: 0.0, 10: accuracy}})

    both = run(of(None, 0.5, 0.8), of("after", 2.0, 0.6))
    assert _steadier(both, "mlp") == pytest.approx({0: 4.0})
    assert _gain(both, "mlp") == pytest.approx({0: 0.1})


def test_a_short_run_is_judged_and_drawn(tmp_path: Path) -> None:
    settings = settings_of(STUDY, "quick", {"steps": 40, "cnn_steps": 40, "seeds": 2})
    plan = plan_study(STUDY, settings, tmp_path / "run")
    assert sorted({job.settings.axes()["placement"] for job in plan.jobs}) == ["after", "before"]
    (done,), _ = run_studies([plan], tmp_path / "run")
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    assert all(set(verdict.effects) == {0, 1} for verdict in verdicts.values())
    # ReLU leaves zeros, and half of them behind batch norm.
    assert all(0.3 < effect < 0.8 for effect in verdicts["cnn-sparse"].effects.values())
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn
    assert {chart.split("-")[0] for chart in drawn} == set(NETWORKS)
