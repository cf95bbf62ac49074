"""The effects of averaging on losses made up for it, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.records import CELLS, RECORDS
from batchnorm.studies.cell_run import CellRun, InterruptedCellError
from batchnorm.studies.library.averaging import (
    STUDY,
    _gradients,
    _lost,
    _more_loss,
    _more_on_the_way,
    _snapshots,
)
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError


def test_effects() -> None:
    whole = {
        "ema/copy/loss": {10: 4.0, 20: 0.9},
        "ema/recompute/loss": {10: 1.0, 20: 0.6, 30: 0.6},
        "swa/recompute/loss": {20: 0.3},
        "accumulation/whole": {0: 0.5, 9: 0.2},
        "test/accuracy": {0: 0.1, 9: 0.9},
    }
    made = run(
        cell("batch", whole),
        cell("ghost8", {"test/accuracy": {0: 0.1, 9: 0.7}}),
    )
    assert _more_loss(made, "ema/copy", "ema/recompute") == pytest.approx({0: 1.5})
    assert _more_loss(made, "ema/recompute", "swa/recompute") == pytest.approx({0: 2.0})
    # √(4 · 1.5), of the steps that both have.
    assert _more_on_the_way(made, "ema/copy", "ema/recompute") == pytest.approx({0: 6**0.5})
    assert _gradients(made, "whole", min) == {0: 0.2}
    assert _gradients(made, "whole", max) == {0: 0.5}
    assert _lost(made) == pytest.approx({0: 0.2})


def test_snapshots_are_an_epoch_apart_and_hold_the_end() -> None:
    assert _snapshots(100, 20) == {60, 80, 100}
    assert _snapshots(5, 100) == {5}


@pytest.mark.parametrize("size", [None, 8, 60])
def test_batches_have_parts(tmp_path: Path, size: int | None) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "quick", {"batch_size": size}), tmp_path / "run")
    with pytest.raises(SettingsError, match="Give a multiple of 8, at least 16"):
        plan.check()


@pytest.mark.parametrize("model", ["mlp", "tests.studies.networks:functional"])
def test_a_short_run_is_judged_and_drawn_and_goes_on_as_if_never_stopped(
    tmp_path: Path, model: str
) -> None:
    changes = {"model": model, "steps": 8, "every": 4, "seeds": 2, "test_limit": 70}
    settings = settings_of(STUDY, "quick", changes | {"batch_size": 16})
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    assert all(set(verdict.effects) == {0, 1} for verdict in verdicts.values())
    for identity in ("accumulation-ghost", "accumulation-still"):
        assert verdicts[identity].verdict == "holds"
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn

    job = plan_study(STUDY, settings, tmp_path / "stopped").jobs[0]
    stops = 0
    while True:
        try:
            STUDY.run(job.settings, CellRun(job.settings, job.folder, stop=lambda: True))
            break
        except InterruptedCellError:
            stops += 1
    assert stops == 8
    expected = (tmp_path / "run" / CELLS / job.folder.name / RECORDS).read_bytes()
    assert (job.folder / RECORDS).read_bytes() == expected
