"""The headline's figures against those computed by hand."""

from __future__ import annotations

import math

import pytest
from tests.report.runs import STEPS, Builder, accuracies, losses, race_of_three_seeds, series

from batchnorm.records import Record
from batchnorm.report import summarize


def test_steps_to_the_best_of_the_other(builder: Builder) -> None:
    race = race_of_three_seeds(builder).race("batch", "none", 0.1)
    assert race is not None
    assert race.target.seeds == {0: 0.7, 1: 0.8, 2: 0.9}
    assert race.steps == {0: 10, 1: 30}
    assert race.missed == [2]
    assert race.median == 30  # of 10, 30 and never
    assert race.other_steps.seeds == {0: 30, 1: 20, 2: 30}


def test_a_target_that_most_seeds_miss_has_no_median(builder: Builder) -> None:
    race = race_of_three_seeds(builder).race("none", "batch", 0.1)
    assert race is not None
    assert race.steps == {2: 30}
    assert race.missed == [0, 1]
    assert race.median is None


def test_final_and_best_accuracy(builder: Builder) -> None:
    summary = race_of_three_seeds(builder)
    final = summary.outcome("none", 0.1).final
    best = summary.outcome("none", 0.1).best
    assert final is not None
    assert best is not None
    assert final.mean == pytest.approx((0.7 + 0.6 + 0.9) / 3)
    assert (final.low, final.median, final.high) == (0.6, 0.7, 0.9)
    assert best.mean == pytest.approx(0.8)


def test_stability(builder: Builder) -> None:
    for seed in range(2):
        builder.cell("none", 0.1, seed, losses(2.0, 1.0) + accuracies(0.1, 0.2, 0.4, 0.5))
        # lower than at the start, but no better than ignoring the input (2.3)
        useless = losses(2.6, 2.4 if seed else 1.0)
        builder.cell("none", 1.0, seed, useless + accuracies(0.1, 0.2, 0.2, 0.3))
        lost = [*accuracies(0.1, 0.2, 0.3, 0.4), Record(33, "", "batch/loss", math.nan)]
        builder.cell("none", 10.0, seed, lost, state="diverged", step=33 + seed)
        for rate in (0.1, 1.0):
            builder.cell("batch", rate, seed, losses(2.0, 1.0) + accuracies(0.1, 0.4, 0.8, 0.9))
        state = "interrupted" if seed else "done"
        builder.cell("batch", 10.0, seed, losses(2.0, 1.0), state=state, step=12)
    summary = summarize(builder.run())
    verdicts = [summary.outcome(arm, lr).stable for arm in summary.arms for lr in summary.rates]
    assert verdicts == [True, False, False, True, True, None]
    assert summary.largest_stable == {"none": 0.1, "batch": 1.0}
    assert summary.outcome("none", 10.0).diverged == {0: 33, 1: 34}
    assert summary.outcome("none", 10.0).final is None
    assert summary.race("batch", "none", 10.0) is None
    assert summary.cells == {
        "planned": 12,
        "done": 9,
        "diverged": 2,
        "unfinished": 1,
        "not_started": 0,
    }
    said = " ".join(summary.sentences)
    assert "without normalization at learning rate 10 in both seeds (steps 33 to 34)" in said
    assert "Largest stable learning rate: 0.1 without normalization and 1 with batch norm" in said
    assert "11 of 12 training runs ended" in said


def test_stable_at_chance_is_called_guessing(builder: Builder) -> None:
    builder.cell("none", 1.0, 0, losses(2.4, 2.29) + accuracies(0.1, 0.11, 0.1, 0.12))
    builder.cell("batch", 1.0, 0, losses(2.4, 0.3) + accuracies(0.1, 0.5, 0.9, 0.95))
    summary = summarize(builder.run())
    assert summary.outcome("none", 1.0).stable
    assert summary.outcome("none", 1.0).guessing
    assert not summary.outcome("batch", 1.0).guessing
    assert "No better than guessing (10.0% for 10 classes)" in " ".join(summary.sentences)


def test_regression_is_judged_by_its_loss(builder: Builder) -> None:
    for norm, values in {"none": (9.0, 5.0, 4.0, 3.0), "batch": (9.0, 2.0, 1.0, 1.5)}.items():
        records = series("test/loss", dict(zip(STEPS, values, strict=True)))
        builder.cell(norm, 0.1, 0, records + losses(9.0, 1.0), kind="regression")
    summary = summarize(builder.run())
    race = summary.race("batch", "none", 0.1)
    assert summary.measure == "test loss"
    assert summary.measured_every == 10
    assert not summary.higher_is_better
    assert race is not None
    assert race.steps == {0: 10}
    best = summary.outcome("batch", 0.1).best
    assert best is not None
    assert best.mean == 1.0


def test_the_rate_shown_is_the_best_of_the_reference(builder: Builder) -> None:
    for rate, top in {0.1: 0.5, 1.0: 0.9, 10.0: 0.3}.items():
        builder.cell("none", rate, 0, accuracies(0.1, 0.2, 0.2, top))
    assert summarize(builder.run()).reference_rate == 1.0


def test_share_of_the_probes(builder: Builder) -> None:
    timing = {"train": 6.0, "gradients": 1.0, "shift": 3.0, "total": 10.0}
    builder.cell("none", 0.1, 0, accuracies(0.1, 0.2, 0.3, 0.4), timing=timing)
    summary = summarize(builder.run())
    assert summary.probe_share == pytest.approx(0.4)
    assert "took 40.0% of the computing time" in " ".join(summary.sentences)
