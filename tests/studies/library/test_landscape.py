"""The effects of landscape on curves made up for it, and a run of a few steps."""

import math
from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.studies.library.landscape import (
    STUDY,
    _change,
    _plateau,
    _ratio,
    _spread,
    _variation,
)
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError


def measured(norm, low, high, beta):
    return cell(
        norm,
        {
            "landscape/loss_low": dict(enumerate(low)),
            "landscape/loss_high": dict(enumerate(high)),
            "landscape/gradient_high": dict(enumerate(high)),
            "landscape/smoothness": dict(enumerate(beta)),
        },
    )


def test_effects() -> None:
    # Variations 1, 3, 2 and a step into overflow; β is read from step ⌈3/6⌉ = 1 on.
    plain = measured("none", [1, 1, 1, 1], [2, 4, 3, math.inf], [900.0, 40.0, 10.0, 10.0])
    normed = measured("batch", [2, 2, 2, 2], [2.2, 2.4, 2.2, 2.3], [1.0, 20.0, 20.0, 20.0])
    assert _variation(plain) == 2.0
    assert _change(plain) == 3.0
    both = run(plain, normed)
    assert _ratio(both, _variation) == pytest.approx({0: 2 / 0.125})
    assert _spread(plain) == pytest.approx(math.log(37 / 10))
    # β·η/2 is 0.5 without and 1 with batch norm at rate 0.1.
    assert _plateau(both) == pytest.approx({0: 0.5})
    with pytest.raises(CannotTellError, match="no finite loss"):
        _variation(measured("none", [1.0], [math.nan], [1.0]))


def test_a_standstill_with_batch_norm_cannot_be_compared() -> None:
    still = run(measured("none", [1], [2], [1]), measured("batch", [1], [1], [1]))
    with pytest.raises(CannotTellError, match="Nothing changes along the gradient of seed 0"):
        _ratio(still, _variation)


def test_only_seeds_with_both_arms_count() -> None:
    arms = [measured("none", [1], [2], [1]), measured("batch", [1], [2], [1])]
    lonely = cell("none", {"landscape/loss_low": {0: 1.0}}, seed=1)
    assert _ratio(run(*arms, lonely), _variation) == {0: 1.0}


def test_a_second_deep_linear_network_is_refused(tmp_path: Path) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "quick", {"model": "linear"}), tmp_path / "run")
    with pytest.raises(SettingsError, match="this study has the deep linear network beside yours"):
        run_studies([plan], tmp_path)


def test_full_scale_says_which_data_it_needs(tmp_path: Path) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "full", {}), tmp_path / "run", scale="full")
    with pytest.raises(SettingsError, match=r"needs CIFAR-10 itself.*--task path/to/cifar10"):
        run_studies([plan], tmp_path)


def test_a_short_run_is_judged_and_drawn_for_both_networks(tmp_path: Path) -> None:
    changes = {"steps": 6, "every": 2, "linear_steps": 6, "seeds": 2, "landscape_points": 2}
    settings = settings_of(STUDY, "quick", changes)
    plan = plan_study(STUDY, settings, tmp_path / "run")
    linear = [job.settings for job in plan.jobs if job.settings.model == "linear"]
    assert {(s.task, s.scaling, s.batch_size, s.lr, s.depth) for s in linear} == {
        ("gaussian", "raw", None, 1e-6, None)
    }
    (done,), _ = run_studies([plan], tmp_path / "run")
    effects = {verdict.claim: verdict.effects for verdict in STUDY.verdicts(done)}
    assert all(set(found) == {0, 1} for found in effects.values())
    drawn = {chart.id: len(chart.panels) for chart in STUDY.figures(done)}
    assert drawn == {
        "loss-variation": 1,
        "predictiveness": 1,
        "smoothness": 1,
        "loss": 1,
        "linear-loss-variation": 1,
        "linear-predictiveness": 1,
        "linear-smoothness": 1,
        "linear-loss": 1,
    }
    named = {figure for claim in STUDY.claims for figure in claim.figures}
    assert named <= set(drawn)
