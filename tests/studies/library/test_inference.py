"""The effects of inference on accuracies made up for it, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.records import CELLS, RECORDS
from batchnorm.studies.corruptions import CORRUPTIONS
from batchnorm.studies.library.inference import (
    SHIFTED,
    STUDY,
    _afterwards,
    _apart,
    _better,
    _earlier,
    _measured,
    _mixed,
    _recovered,
)
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.verdicts import CannotTellError


def ended(**accuracies: float):
    """Accuracies at the end by set and way, written with __ and _ for / and -."""
    names = {name.replace("__", "/").replace("_", "-"): a for name, a in accuracies.items()}
    return cell("batch", {f"{name}/accuracy": {100: a} for name, a in names.items()})


def test_differences_at_the_end() -> None:
    made = run(ended(algorithm2=0.9, pooled=0.92, clean__batch_256=0.8, clean__batch_2=0.3))
    assert _better(made, "algorithm2", "pooled") == pytest.approx({0: -0.02})
    assert _apart(made, "algorithm2", "pooled") == pytest.approx({0: 0.02})
    assert _better(made, "clean/batch-256", "clean/batch-2") == pytest.approx({0: 0.5})


def test_the_beginning_is_a_tenth() -> None:
    series = {
        "algorithm2/accuracy": {0: 0.2, 5: 0.4, 10: 0.4, 100: 0.0},
        "running-0.1/accuracy": {0: 0.2, 5: 0.2, 10: 0.2, 100: 1.0},
    }
    # Trapezoids: (0.3 + 0.4) / 2 − 0.2.
    assert _earlier(run(cell("batch", series))) == pytest.approx({0: 0.15})


def test_what_is_recovered_of_a_shift() -> None:
    made = ended(
        clean__running=0.9,
        noise__running=0.4,
        blur__running=0.2,
        noise__batch_32=0.7,
        blur__batch_32=0.5,
        noise__batch_8=0.6,
        blur__batch_8=0.4,
        noise__mixture_8=0.8,
        blur__mixture_8=0.4,
        noise__adapted_8=0.3,
        blur__adapted_8=0.3,
    )
    # Errors: 0.1 clean, 0.7 shifted, 0.4 with batches of 32.
    assert _recovered(run(made)) == pytest.approx({0: 0.5})
    assert _mixed(run(made)) == pytest.approx({0: 0.1})
    assert _afterwards(run(made)) == pytest.approx({0: 0.3})
    with pytest.raises(CannotTellError, match="cost nothing for seed 0"):
        _recovered(run(ended(clean__running=0.5, noise__running=0.6, noise__batch_32=0.7)))
    with pytest.raises(CannotTellError, match="no accuracy on shifted data"):
        _recovered(run(ended(clean__running=0.5)))


def test_the_beginning_is_measured_ten_times_as_often() -> None:
    assert _measured(400, 100) == {0, 10, 20, 30, 40, 100, 200, 300, 400}
    assert max(_measured(7, None)) == 7


def test_all_corruptions_are_judged() -> None:
    assert set(SHIFTED) == set(CORRUPTIONS)


@pytest.mark.parametrize("model", ["mlp", "tests.studies.networks:functional"])
def test_a_short_run_is_judged_and_drawn_and_goes_on_as_if_never_stopped(
    tmp_path: Path, model: str
) -> None:
    changes = {"model": model, "steps": 12, "every": 4, "seeds": 2, "test_limit": 70}
    settings = settings_of(STUDY, "quick", changes)
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    assert all(c.ended for c in done.cells)
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    for claim, verdict in verdicts.items():
        # Batches of 256 are more than the test set has; the mlp cannot normalise one example.
        if claim not in ("large-batches", "single"):
            assert verdict.effects or "cost nothing" in verdict.note, claim
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn

    from batchnorm.studies.cell_run import CellRun, InterruptedCellError

    job = plan_study(STUDY, settings, tmp_path / "stopped").jobs[0]
    stops = 0
    while True:
        try:
            STUDY.run(job.settings, CellRun(job.settings, job.folder, stop=lambda: True))
            break
        except InterruptedCellError:
            stops += 1
    assert stops == 12
    name = job.folder.name
    expected = (tmp_path / "run" / CELLS / name / RECORDS).read_bytes()
    assert (job.folder / RECORDS).read_bytes() == expected
