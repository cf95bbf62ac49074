"""The effects on courses made up for them, what the arms change, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.studies.library.accelerate import (
    GROUPS,
    STUDY,
    _fails,
    _higher,
    _of,
    _speed,
)
from batchnorm.studies.modifications import ARMS, AccelerateSettings, arm_cells
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError

BASELINE = AccelerateSettings(
    model="cnn", steps=60, weight_decay=5e-4, shuffle="once", distortion=0.4, seeds=2
)


def course(arm, *accuracies, state="done", steps=100):
    """A test accuracy every 10 of 100 steps."""
    made = cell(arm, {"test/accuracy": {10 * i: a for i, a in enumerate(accuracies)}}, arm=arm)
    made.manifest["settings"]["steps"] = steps
    made.manifest["state"] = state
    return made


PLAIN = course("none", 0.1, 0.3, 0.5, 0.4, 0.7, 0.6)


def test_speed_is_in_steps_to_the_best_of_the_plain_network() -> None:
    fast, slow = course("batch", 0.1, 0.2, 0.8, 0.1), course("x5", 0.1, 0.69)
    assert _speed(run(PLAIN, fast), "batch", "none") == {0: 40 / 20}
    # One that never gets there counts as if it did at the last step.
    assert _speed(run(PLAIN, fast, slow), "x5", "batch") == {0: 20 / 100}
    assert _speed(run(PLAIN, fast, slow), "batch", "x5") == {0: 100 / 20}
    assert _speed(run(fast, slow), "x5", "batch") == {}
    with pytest.raises(CannotTellError, match="Neither network reaches"):
        _speed(run(PLAIN, slow, course("x30", 0.1, 0.2)), "x5", "x30")
    with pytest.raises(CannotTellError, match="without batch norm does not learn"):
        _speed(run(course("none", 0.1, 0.14), fast), "batch", "none")


def test_shares_are_of_what_was_learned_above_guessing() -> None:
    sigmoid = course("x5-sigmoid", 0.1, 0.4, 0.3)
    assert _of(run(PLAIN, sigmoid), "x5-sigmoid", "none") == pytest.approx({0: 0.3 / 0.6})
    assert _higher(run(PLAIN, sigmoid), "x5-sigmoid", "none") == pytest.approx({0: -0.3})
    assert _fails(run(PLAIN, course("none-x5", 0.1, 0.6, 0.25))) == pytest.approx({0: 0.15 / 0.6})
    overflowed = course("none-x5", 0.1, 0.6, state="diverged")
    assert _fails(run(PLAIN, overflowed)) == {0: 0.0}


def test_the_figure_says_how_many_steps_it_took() -> None:
    drawn = {c.id: c for c in STUDY.figures(run(PLAIN, course("x5", 0.1, 0.8), course("l2", 0.2)))}
    assert drawn["accuracy"].findings[""] == (
        "Steps to the best accuracy of the network without normalization, mean of the seeds: "
        "40 (none) and 10 (BN ×5)."
    )
    # Each arm is a line of its own; of one seed there is no interval.
    assert [line.arm for line in drawn["best"].panels[0].lines] == [
        list(ARMS).index(arm) for arm in ("none", "x5", "l2")
    ]
    assert [line.y[0] for line in drawn["best"].panels[0].lines] == [0.7, 0.8, 0.2]
    assert all(line.low is None for line in drawn["best"].panels[0].lines)


def differences(settings: AccelerateSettings) -> dict[str, dict[str, object]]:
    """In what each arm of seed 0 differs from batch norm at the baseline's settings."""
    arms = {one.arm: one.document() for one in arm_cells(settings) if one.seed == 0}
    names = {name for document in arms.values() for name in document} - {"arm"}
    return {
        arm: {n: own.get(n) for n in names if own.get(n) != arms["batch"].get(n)}
        for arm, own in arms.items()
    }


def test_each_arm_changes_what_the_paper_lists() -> None:
    single = {
        "rate": {"lr": pytest.approx(0.05)},
        "decay": {"lr_halving": 10.0},
        "dropout": {"dropout": None},
        "lrn": {"lrn": None},
        "l2": {"weight_decay": 1e-4},
        "shuffle": {"shuffle": None},
        "distortion": {"distortion": 0.2},
    }
    every = {name: value for change in single.values() for name, value in change.items()}
    found = differences(BASELINE)
    assert found == {
        "none": {"norm": "none"},
        "batch": {},
        "x5": every,
        "x30": every | {"lr": pytest.approx(0.3)},
        "none-x5": {"norm": "none", "lr": pytest.approx(0.05)},
        "x5-sigmoid": every | {"activation": "sigmoid"},
        "none-sigmoid": {"norm": "none", "activation": "sigmoid"},
        **single,
    }
    assert list(ARMS) == list(dict.fromkeys(name for names in GROUPS.values() for name in names))
    assert set(found) == set(ARMS)


def test_what_the_baseline_does_not_have_cannot_be_changed() -> None:
    bare = AccelerateSettings(model="mlp", dropout=0)
    assert set(differences(bare)) == {
        *("none", "batch", "x5", "x30", "none-x5", "x5-sigmoid", "none-sigmoid"),
        *("rate", "decay"),
    }
    own = BASELINE.model_copy(update={"model": "tests.studies.networks:functional"})
    left = set(ARMS) - {"x5-sigmoid", "none-sigmoid", "dropout", "lrn"}
    assert set(differences(own)) == left
    assert {(one.dropout, one.lrn) for one in arm_cells(own)} == {(None, None)}


@pytest.mark.parametrize("model", ["cnn", "tests.studies.networks:functional"])
def test_a_short_run_is_judged_and_drawn(tmp_path: Path, model: str) -> None:
    changes = {"steps": 4, "every": 2, "seeds": 2, "test_limit": 30, "model": model}
    settings = settings_of(STUDY, "quick", changes)
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    assert set(verdicts["x30-best"].effects) == {0, 1}
    charts = {chart.id: chart for chart in STUDY.figures(done) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= set(charts)
    assert len(charts["best"].panels[0].lines) == len({one.arm for one in arm_cells(settings)})


def test_the_full_scale_needs_its_data(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs CIFAR-10 itself"):
        plan_study(STUDY, settings_of(STUDY, "full", {}), tmp_path).check()
