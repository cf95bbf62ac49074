"""The headline in sentences."""

from __future__ import annotations

import json
import math

from tests.report.runs import Builder, accuracies, losses, race_of_three_seeds, series

from batchnorm.report import summarize


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
