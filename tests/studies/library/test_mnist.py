"""The effects of mnist on curves made up for it, and a run of a few steps."""

from pathlib import Path

import pytest

from batchnorm.records import Cell, Record, Run
from batchnorm.studies.library.mnist import PAPER, STUDY, _distance, _gain, _speed, _wandering
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError


def cell(norm: str, accuracy: dict[int, float], median: tuple[float, ...] = (0.0, 1.0)) -> Cell:
    records = [Record(step, "", "test/accuracy", value) for step, value in accuracy.items()]
    records += [Record(i, "hidden3", "activation/p50", v) for i, v in enumerate(median)]
    manifest = {
        "settings": {"norm": norm, "lr": 0.1, "seed": 0},
        "state": "done",
        "layers": ["hidden1", "hidden3", "output"],
    }
    return Cell(Path(norm), manifest, tuple(records))


def run_of(*cells: Cell) -> Run:
    return Run(Path(), {"scale": "full"}, cells)


def test_effects() -> None:
    plain = cell("none", {0: 0.1, 100: 0.5, 200: 0.8, 300: 0.7}, (0.0, 3.0, -1.0))
    normed = cell("batch", {0: 0.1, 50: 0.8, 300: 0.9}, (0.5, 0.0, 0.25))
    run = run_of(plain, normed)
    assert _speed(run) == {0: 4.0}
    assert _gain(run) == pytest.approx({0: 0.2})
    assert _wandering(run) == {0: 8.0}
    never = run_of(plain, cell("batch", {0: 0.1, 300: 0.2}))
    assert _speed(never) == {0: 200 / 300}


def test_distance_from_the_papers_curve() -> None:
    shifted = {step: value + 0.01 for step, value in PAPER["batch"].items()}
    assert _distance(run_of(cell("batch", shifted)), "batch") == pytest.approx({0: 0.01})
    with pytest.raises(CannotTellError, match="no measurement at the steps"):
        _distance(run_of(cell("batch", {0: 0.1})), "batch")


def test_full_scale_says_which_data_it_needs(tmp_path: Path) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "full", {}), tmp_path / "run", scale="full")
    with pytest.raises(SettingsError, match=r"needs MNIST itself.*--task path/to/mnist"):
        run_studies([plan], tmp_path)
    assert not (tmp_path / "run").exists()


def test_full_scale_measures_at_every_point_of_the_paper() -> None:
    settings = STUDY.scales["full"]
    assert all(step % settings.every == 0 for points in PAPER.values() for step in points)


def test_a_short_run_is_judged_and_drawn(tmp_path: Path) -> None:
    settings = settings_of(STUDY, "quick", {"steps": 40, "every": 10, "seeds": 2})
    (run,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    assert len(STUDY.verdicts(run)) == len(STUDY.claims)
    accuracy, inside = STUDY.figures(run)
    assert len(accuracy.panels[0].lines) == 2  # the paper's curve begins later
    assert {panel.layer for panel in inside.panels} == {"hidden3"}
