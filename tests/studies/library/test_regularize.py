"""The effects of regularize on numbers made up for it, and a run of a few steps."""

import math
from pathlib import Path

import pytest
import torch
from tests.studies.library.made_up import cell, run
from torch import nn

from batchnorm.nn.norms import NORMS as KNOWN
from batchnorm.probes import Layer, Step
from batchnorm.probes.gamma import Gamma
from batchnorm.studies.library.regularize import (
    GHOSTS,
    NORMS,
    STUDY,
    _compare,
    _dose,
    _dropout_saves,
    _error,
    _gap,
    _minus,
    _of,
    _ratio,
    _scale,
)
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError


def ended(norm, size, gap, error=0.1, **settings):
    series = {
        "train/loss": {0: 2.0, 9: 0.5},
        "test/loss": {0: 9.0, 9: 0.5 + gap},
        "test/accuracy": {0: 0.1, 9: 1 - error},
        "one:gamma/rms": {0: 1.0, 9: 3.0},
        "two:gamma/rms": {0: 1.0, 9: 1.0},
    }
    return cell(norm, series, layers=("one", "two", "out"), batch_size=size, **settings)


def test_effects() -> None:
    made = run(
        ended("batch", 4, 0.2, error=0.1),
        ended("renorm", 4, 0.3, error=0.15),
        ended("batch", 64, 0.4),
        ended("renorm", 4, 0.3, seed=1),
    )
    both = _of(made, "renorm", min), _of(made, "batch", min)
    assert _compare(*both, _gap, _ratio) == pytest.approx({0: 1.5})
    assert _compare(*both, _error, _minus) == pytest.approx({0: 0.05})
    assert _gap(_of(made, "batch", max)[0]) == pytest.approx(0.4)
    assert _scale(made.cells[0]) == pytest.approx(math.sqrt((9 + 1) / 2))


def test_dose_is_the_power_of_the_size() -> None:
    sizes = {"ghost4": 4, "ghost16": 16, "batch": 64}
    made = run(*(ended(norm, 64, 0.01 * size**0.5) for norm, size in sizes.items()))
    assert _dose(made) == pytest.approx({0: 0.5})
    assert _dose(run(ended("batch", 64, 0.1))) == {}


def test_what_dropout_saves() -> None:
    made = run(
        ended("none", 64, 0.1, error=0.3),
        ended("none", 64, 0.1, error=0.2, dropout=0.5),
        ended("batch", 64, 0.1, error=0.1),
        ended("batch", 64, 0.1, error=0.15, dropout=0.5),
        ended("batch", 4, 0.1, error=0.4),
    )
    assert _dropout_saves(made, "none") == pytest.approx({0: 0.1})
    assert _dropout_saves(made, "batch") == pytest.approx({0: -0.05})
    with pytest.raises(CannotTellError, match="No network"):
        _dropout_saves(run(ended("none", 64, 0.1)), "none")


def test_ones_own_network_decides_on_dropout_itself(tmp_path: Path) -> None:
    own = {"model": "tests.studies.networks:functional"}
    plan = plan_study(STUDY, settings_of(STUDY, "quick", own), tmp_path / "run")
    assert all(job.settings.dropout is None for job in plan.jobs)
    plan.check()
    plan = plan_study(STUDY, settings_of(STUDY, "quick", own | {"dropout": 0.2}), tmp_path / "run")
    with pytest.raises(SettingsError, match="decides itself"):
        plan.check()


def test_no_ratio_of_gaps_that_are_none() -> None:
    made = run(ended("batch", 64, -0.1), ended("ghost16", 64, 0.1))
    with pytest.raises(CannotTellError, match="not worse on the test set"):
        _compare(_of(made, "batch", max), _of(made, "ghost16", max), _gap, _ratio)


def test_scale_is_the_root_mean_square_of_gamma() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([3.0, 4.0]))
    step = Step(
        number=7,
        model=model,
        layers=[Layer("0", model[1], frozenset())],
        x=torch.zeros(2, 2),
        y=torch.zeros(2),
        loss_function=nn.functional.mse_loss,
        lr=0.1,
        random_state=torch.get_rng_state(),
    )
    (record,) = Gamma(5).before_update(step)
    assert (record.step, record.layer, record.quantity) == (7, "0", "gamma/rms")
    assert record.value == pytest.approx(math.sqrt(12.5))


def test_a_short_run_is_judged_and_drawn(tmp_path: Path) -> None:
    changes = {"sizes": (4, 32), "steps": 3, "every": 3, "seeds": 2}
    settings = settings_of(STUDY, "quick", changes)
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    assert {c.settings["norm"] for c in done.cells} == {*NORMS, "ghost4", "ghost8", "ghost16"}
    assert set(NORMS) | set(GHOSTS) <= set(KNOWN)
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    for claim in ("noise-error", "small-error", "scale-decay", "dropout-removed"):
        assert set(verdicts[claim].effects) == {0, 1}, verdicts[claim].note
    drawn = {chart.id for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn
