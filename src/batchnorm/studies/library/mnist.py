"""[P1] Figure 1: how fast a small sigmoid network learns MNIST, and what one sigmoid receives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from batchnorm.records import Run
from batchnorm.report.charts.activations import percentiles
from batchnorm.report.charts.panels import seed_lines, seeds_band, steps_axis
from batchnorm.report.grid import Grid
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel
from batchnorm.report.words import count, percent
from batchnorm.studies.measures import pairs
from batchnorm.studies.settings import CellSettings, PositiveRate
from batchnorm.studies.study import (
    Study,
    TrainingStudySettings,
    check_data_given,
    training_cells,
)
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

# Test accuracy by step, digitised from the vector figure: good to 1–2 % of its axis.
PAPER = {
    "none": {3600: 0.711, 6600: 0.863, 9600: 0.922, 15600: 0.955, 25000: 0.968, 44000: 0.972},
    "batch": {4000: 0.953, 10000: 0.966, 16000: 0.975, 28000: 0.978, 49000: 0.982},
}


class Settings(TrainingStudySettings):
    """[P1] Section 4.1 where it says what was done; see docs/studies/mnist.md for the rest."""

    lr: PositiveRate = 0.1
    """Learning rate of both networks."""


def cells(settings: Settings) -> list[CellSettings]:
    return training_cells(settings, lr=[settings.lr])


def _distance(run: Run, norm: str) -> dict[int, float]:
    """Mean distance from the paper's curve over its points."""
    found = {}
    for seed, cell in run.by_seed(norm=norm).items():
        measured = cell.series("test/accuracy")
        gaps = [abs(measured[s] - value) for s, value in PAPER[norm].items() if s in measured]
        if len(gaps) < len(PAPER[norm]):
            raise CannotTellError("The run has no measurement at the steps of the paper's points")
        found[seed] = float(np.mean(gaps))
    return found


def _speed(run: Run) -> dict[int, float]:
    """Steps of the plain network to its best accuracy, over those of batch norm to the same."""
    found = {}
    for seed, (plain, normed) in pairs(run).items():
        slow = plain.series("test/accuracy")
        best = max(slow.values())
        first = min(step for step, value in slow.items() if value == best)
        when = [step for step, value in normed.series("test/accuracy").items() if value >= best]
        # Where it is not reached, the last step says the most that the ratio can be.
        found[seed] = max(first, 1) / max(min(when, default=max(slow)), 1)
    return found


def _gain(run: Run) -> dict[int, float]:
    ends = {}
    for seed, pair in pairs(run).items():
        plain, normed = (cell.series("test/accuracy") for cell in pair)
        ends[seed] = normed[max(normed)] - plain[max(plain)]
    return ends


def _wandering(run: Run) -> dict[int, float]:
    """Range of the unit's median over the run, without batch norm over with it."""
    found = {}
    for seed, pair in pairs(run).items():
        layer = pair[0].layers[-2]
        plain, normed = (list(cell.series("activation/p50", layer).values()) for cell in pair)
        found[seed] = float(np.ptp(plain) / np.ptp(normed))
    return found


def figures(run: Run) -> list[Chart]:
    grid = Grid(run)
    rate = grid.rates[0]
    lines = seed_lines(grid, rate, "test/accuracy")
    paper = [
        Line(2 + index, np.array(list(points), dtype=float), np.array(list(points.values())))
        for index, points in enumerate(PAPER.values())
        if max(points) <= grid.steps
    ]
    accuracy = Chart(
        id="accuracy",
        title="Test accuracy, and the paper's curve" if paper else "Test accuracy",
        how="Each line is the mean over the seeds"
        + ("; the paper's points are digitised from its figure" if paper else "")
        + ". Compare how many steps each needs to reach the same height.",
        source=f"{P1}, Figure 1(a)",
        x=steps_axis(grid),
        y=Axis("test accuracy", percent=True),
        panels=[Panel("", [*lines, *paper], domain=(0.0, 1.0))] if lines else [],
        band=seeds_band(grid),
        findings={"": _point_by_point(grid)},
    )
    inside = percentiles(grid)
    hidden = grid.layers[-2] if len(grid.layers) > 1 else ""
    panels = [panel for panel in inside.panels if panel.layer == hidden]
    return [accuracy, replace(inside, panels=panels, overview=None)]


def _point_by_point(grid: Grid) -> str:
    said = []
    for arm in grid.arms:
        series = grid.series(arm, grid.rates[0], "test/accuracy")
        if series is None:
            continue
        measured = dict(zip(series.x.tolist(), series.y.tolist(), strict=True))
        said += [
            f"{arm.label}, step {count(step)}: {percent(measured[step])} here, "
            f"{percent(value)} in the paper."
            for step, value in PAPER.get(arm.name, {}).items()
            if step in measured
        ]
    return " ".join(said)


_SCALE = "the paper's curve is of MNIST over 50,000 steps"

STUDY = Study(
    name="mnist",
    question="Does a sigmoid network learn MNIST in fewer steps and to a higher accuracy with "
    "batch norm, and does what its last sigmoids receive stay steadier?",
    source="[P1] Section 4.1, Figure 1",
    settings=Settings,
    scales={
        "quick": Settings(
            steps=1500, batch_size=60, every=50, probes=("performance", "activations"), lr=0.5
        ),
        "full": Settings(
            task="mnist",
            scaling="binary",
            steps=50_000,
            batch_size=60,
            every=200,
            test_limit=10_000,
            probes=("performance", "activations"),
        ),
    },
    cells=cells,
    check=check_data_given,
    figures=figures,
    lines=("none", "batch", "[P1] without batch norm", "[P1] with batch norm"),
    claims=[
        Claim(
            id="faster",
            sentence="Batch norm reaches the plain network's best test accuracy in fewer steps",
            source="[P1] Figure 1(a)",
            reported="97.2% after 44,000 steps without, between 10,000 and 16,000 with: 2.75 times",
            effect="steps to the plain network's best accuracy, without over with",
            measure=_speed,
            rule=Above(2.75, null=1.0),
            ratio=True,
            figures=("accuracy",),
        ),
        Claim(
            id="higher",
            sentence="Batch norm ends at a higher test accuracy",
            source="[P1] Figure 1(a)",
            reported="98.2% against 97.2%; asked for here: half of that difference",
            effect="final test accuracy, with minus without",
            measure=_gain,
            rule=Above(0.005, null=0.0),
            figures=("accuracy",),
            percent=True,
        ),
        Claim(
            id="steadier",
            sentence="The distribution that a sigmoid of the last hidden layer receives is more "
            "stable with batch norm",
            source="[P1] Figure 1(b, c)",
            reported="the median spans 1.34 without and 0.36 with: 3.7 times; asked for: twice",
            effect="span of the unit's median over the run, without over with",
            measure=_wandering,
            rule=Above(2.0, null=1.0),
            ratio=True,
            figures=("percentiles",),
        ),
        Claim(
            id="curve-batch",
            sentence="The accuracies with batch norm are those of the paper's curve",
            source="[P1] Figure 1(a)",
            reported="95.3% at 4,000 steps, 96.6% at 10,000, 98.2% at 49,000",
            effect="mean distance from the curve over its 5 points",
            measure=lambda run: _distance(run, "batch"),
            rule=Below(0.02),
            figures=("accuracy",),
            full_only=_SCALE,
            percent=True,
        ),
        Claim(
            id="curve-none",
            sentence="The accuracies without batch norm are those of the paper's curve",
            source="[P1] Figure 1(a)",
            reported="71.1% at 3,600 steps, 92.2% at 9,600, 97.2% at 44,000",
            effect="mean distance from the curve over its 6 points",
            measure=lambda run: _distance(run, "none"),
            rule=Below(0.02),
            figures=("accuracy",),
            full_only=_SCALE,
            percent=True,
        ),
    ],
)
