"""The effects of batch-size on errors made up for it, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.nn.norms import NORMS as KNOWN
from batchnorm.records import Run
from batchnorm.studies.library.batch_size import (
    GHOSTS,
    NORMS,
    STUDY,
    _errors,
    _ghosts,
    _helps,
    _rise,
    _share_of_rise,
    figures,
)
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError


def ended(norm, size, error, **settings):
    series = {f"{part}/accuracy": {0: 0.1, 9: 1 - error} for part in ("train", "test")}
    return cell(norm, series, batch_size=size, **settings)


def whole() -> Run:
    """Batch norm rises by 0.4, group norm by 0.02; the others are in between."""
    return run(
        ended("batch", 2, 0.5),
        ended("batch", 32, 0.1),
        ended("group", 2, 0.14),
        ended("group", 32, 0.12),
        ended("renorm", 2, 0.4),
        ended("frozen", 2, 0.2),
        ended("ghost2", 32, 0.3),
        ended("ghost4", 32, 0.11),
    )


def test_effects() -> None:
    assert _rise(whole()) == pytest.approx({0: 0.4})
    assert _share_of_rise(whole(), _rise(whole(), "group")) == pytest.approx({0: 0.05})
    assert _helps(whole(), "renorm") == pytest.approx({0: 0.25})
    assert _helps(whole(), "frozen") == pytest.approx({0: 0.75})
    assert _ghosts(whole()) == pytest.approx({0: 0.5})


def test_a_network_that_diverged_has_the_error_of_guessing() -> None:
    lost = ended("batch", 2, 0.0)
    lost.manifest["state"] = "diverged"
    assert _errors(run(lost), "batch", min) == {0: 0.9}


def test_no_share_of_a_rise_that_is_none() -> None:
    flat = run(ended("batch", 2, 0.1), ended("batch", 32, 0.1), ended("renorm", 2, 0.1))
    with pytest.raises(CannotTellError, match="does not rise for seed 0"):
        _helps(flat, "renorm")


def test_the_figure_has_parts_at_their_own_size() -> None:
    (chart,) = figures(whole())
    lines = {line.arm: line for line in chart.panels[0].lines}
    assert lines[0].x.tolist() == [2, 32]
    assert lines[0].y.tolist() == pytest.approx([0.5, 0.1])
    assert lines[len(NORMS)].x.tolist() == [2, 4]
    assert lines[len(NORMS)].y.tolist() == pytest.approx([0.3, 0.11])
    assert chart.x.ticks == [2, 4, 32]


def test_all_sizes_see_as_many_examples_at_rates_in_proportion(tmp_path: Path) -> None:
    settings = settings_of(STUDY, "quick", {"sizes": (4, 16), "steps": 10, "lr": 0.8, "every": 5})
    cells = [job.settings for job in plan_study(STUDY, settings, tmp_path / "run").jobs]
    assert {c.steps * c.batch_size for c in cells} == {160}
    assert {c.every * c.batch_size for c in cells} == {80}
    assert {(c.batch_size, c.lr) for c in cells} == {(4, 0.2), (16, 0.8)}
    assert {c.norm for c in cells} == {*NORMS, "ghost4"}
    assert set(NORMS) | set(GHOSTS) <= set(KNOWN)


def test_the_batch_size_is_what_the_study_varies(tmp_path: Path) -> None:
    for changes, message in (
        ({"batch_size": 8}, "this study varies it"),
        ({"sizes": (8,)}, "two sizes or more"),
    ):
        plan = plan_study(STUDY, settings_of(STUDY, "quick", changes), tmp_path / "run")
        with pytest.raises(SettingsError, match=message):
            plan.check()


def test_a_short_run_of_ones_own_network_is_judged_and_drawn(tmp_path: Path) -> None:
    changes = {
        "model": "tests.studies.networks:functional",
        "sizes": (2, 4),
        "steps": 4,
        "every": 2,
        "seeds": 2,
    }
    settings = settings_of(STUDY, "quick", changes)
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    assert {c.settings["norm"] for c in done.cells} == {*NORMS, "ghost2"}
    assert all(c.ended for c in done.cells)
    assert set(_rise(done)) == {0, 1}
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn
