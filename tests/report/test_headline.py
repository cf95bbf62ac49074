"""The headline against figures computed by hand."""

from __future__ import annotations

import json
import math

import pytest
from tests.report.runs import Builder, series

from batchnorm.records import Record
from batchnorm.report import Summary, summarize

STEPS = (0, 10, 20, 30)


def accuracies(*values: float) -> list[Record]:
    return series("test/accuracy", dict(zip(STEPS, values, strict=True)))


def losses(first: float, last: float) -> list[Record]:
    return series("train/loss", {0: first, 30: last})


def race_of_three_seeds(builder: Builder) -> Summary:
    none = [(0.1, 0.5, 0.6, 0.7), (0.1, 0.4, 0.8, 0.6), (0.1, 0.2, 0.3, 0.9)]
    batch = [(0.1, 0.7, 0.8, 0.8), (0.1, 0.6, 0.75, 0.85), (0.1, 0.3, 0.5, 0.8)]
    for seed in range(3):
        builder.cell("none", 0.1, seed, accuracies(*none[seed]) + losses(2.3, 1.0))
        builder.cell("batch", 0.1, seed, accuracies(*batch[seed]) + losses(2.3, 0.5))
    return summarize(builder.run())


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


def test_missed_seeds_are_said(builder: Builder) -> None:
    said = " ".join(race_of_three_seeds(builder).sentences)
    assert "in 2 of 3 seeds, after 20 steps (10 to 30) there, and not in the others" in said
    assert "The ranges over the seeds overlap." in said


def test_more_steps_are_not_called_fewer(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, accuracies(0.1, 0.8, 0.8, 0.8))
    builder.cell("batch", 0.1, 0, accuracies(0.1, 0.2, 0.8, 0.8))
    said = " ".join(summarize(builder.run()).sentences)
    assert "after 20 steps" in said
    assert "needed 10: 0.5 times as many, so fewer" in said
    assert "a single seed, the difference may be chance" in said


def test_no_effect_is_said_to_be_none(builder: Builder) -> None:
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, accuracies(0.1, 0.5, 0.8, 0.8))
    assert "needed 20: about as many" in " ".join(summarize(builder.run()).sentences)


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


def test_json_and_sentences_hold_numbers_only(builder: Builder) -> None:
    lost = [*series("test/accuracy", {0: 0.1, 10: math.nan}), *losses(2.0, math.inf)]
    builder.cell("none", 0.1, 0, lost, state="diverged", step=10)
    builder.cell("batch", 0.1, 0, None)
    summary = summarize(builder.run())
    json.dumps(summary.document(), allow_nan=False)
    said = " ".join(summary.sentences).split()
    assert not {"nan", "inf", "None"} & {word.strip(".,():%").lower() for word in said}


def test_nothing_started(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, None)
    summary = summarize(builder.run())
    assert summary.reference_rate is None
    assert summary.sentences == [
        "This study is not finished: 0 of 1 training run ended, 0 stopped or going on, "
        "1 not started. Figures are over those that ended."
    ]
