"""Loss and accuracy, and where they ended at each learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from batchnorm.report.charts.panels import panels_by_rate, seed_lines, seeds_band, steps_axis
from batchnorm.report.charts.sentences import at_each_rate, ends, sentence
from batchnorm.report.grid import Grid
from batchnorm.report.papers import P1, P2
from batchnorm.report.spec import Axis, Chart, End, Line, Panel, Rule, fit
from batchnorm.report.summary import Summary
from batchnorm.report.words import number, percent, plural, steps_span

__all__ = ["accuracy", "against_learning_rate", "loss"]


def loss(grid: Grid) -> Chart:
    """The loss on training batches and on both sets."""
    places = {
        "batch/loss": "training batches",
        "train/loss": "training set",
        "test/loss": "test set",
    }

    def panels(i: int, rate: float) -> Iterable[Panel]:
        drawn = {name: seed_lines(grid, rate, quantity) for quantity, name in places.items()}
        covers = fit([line for lines in drawn.values() for line in lines], log=True)
        for name, lines in drawn.items():
            yield Panel(name, lines, rate=i, domain=covers)

    def find(grid: Grid, rate: float) -> str:
        course = _course(grid, rate, "train/loss", "The loss on the training set", number)
        return f"{course} {_diverged(grid, rate)}".strip()

    return Chart(
        id="loss",
        title="Loss",
        how="Lower is better, and a line that falls sooner learns in fewer steps. On training "
        "batches the network runs in training mode, on the two sets in evaluation mode.",
        source="the quantity that [P1] and [P2] minimise",
        x=steps_axis(grid),
        y=Axis("loss", type="log"),
        panels=panels_by_rate(grid, panels),
        band=seeds_band(grid),
        columns=3,
        findings=at_each_rate(grid, find),
    )


def accuracy(grid: Grid) -> Chart:
    """The accuracy on both sets, beside that of guessing."""
    places = {"train/accuracy": "training set", "test/accuracy": "test set"}

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for quantity, name in places.items():
            lines = seed_lines(grid, rate, quantity)
            yield Panel(name, lines, rate=i, domain=(0.0, 1.0), rules=_guessing(grid))

    return Chart(
        id="accuracy",
        title="Accuracy",
        how="Higher is better; compare how many steps each line needs to reach the same height.",
        source=f"{P1}, Figure 1(a); {P2}, Figure 1",
        x=steps_axis(grid),
        y=Axis("accuracy", percent=True),
        panels=panels_by_rate(grid, panels),
        band=seeds_band(grid),
        columns=2,
        findings=at_each_rate(
            grid, lambda grid, rate: _course(grid, rate, "test/accuracy", "Test accuracy", percent)
        ),
    )


def against_learning_rate(grid: Grid, summary: Summary) -> Chart:
    """Where each arm ended, over the learning rates that were tried."""
    share = summary.higher_is_better
    lines = _final_lines(grid, summary)
    # On a log axis the outermost points shall not sit on the frame.
    margin = (grid.rates[-1] / grid.rates[0]) ** 0.05
    domain = (grid.rates[0] / margin, grid.rates[-1] * margin)
    covers = (0.0, 1.0) if share else fit(lines, log=True)
    panel = Panel("", lines, domain=covers, rules=_guessing(grid) if share else [])
    return Chart(
        id="learning-rate",
        title=f"Final {summary.measure} against learning rate",
        how="Each point is a learning rate that was tried, each line an arm; a line that stays "
        f"{'high' if share else 'low'} over a wide range forgives a badly chosen rate.",
        source=f"{P1}, Section 4.2.1; {P2}, Figure 1",
        x=Axis("learning rate", type="log", ticks=grid.rates, domain=domain),
        y=Axis(summary.measure, type="linear" if share else "log", percent=share),
        panels=[panel] if lines and len(grid.rates) > 1 else [],
        band=seeds_band(grid),
        dots=True,
        findings={"": _best_rates(grid, summary)},
    )


def _final_lines(grid: Grid, summary: Summary) -> list[Line]:
    several = len(grid.seeds) > 1
    lines = []
    for index, arm in enumerate(grid.arms):
        outcomes = [summary.outcome(arm.name, rate) for rate in grid.rates]
        if not any(one.final or one.diverged for one in outcomes):
            continue
        y, low, high = (
            np.array([getattr(one.final, part) if one.final else math.nan for one in outcomes])
            for part in ("mean", "low", "high")
        )
        lines.append(
            Line(
                index,
                np.array(grid.rates),
                y,
                low if several else None,
                high if several else None,
                [
                    # With no seed left there is no value: the mark stands at the foot.
                    End(one.lr, one.final.mean if one.final else -math.inf)
                    for one in outcomes
                    if one.diverged
                ],
            )
        )
    return lines


def _guessing(grid: Grid) -> list[Rule]:
    return [Rule(grid.guessing, "guessing")] if grid.guessing is not None else []


def _course(grid: Grid, rate: float, quantity: str, what: str, show: Callable[[float], str]) -> str:
    """From where to where a quantity of the whole network went."""
    parts = [
        f"from {show(went[0])} to {show(went[1])} {arm.phrase}"
        for arm in grid.arms
        if (went := ends(grid.series(arm, rate, quantity)))
    ]
    return sentence(f"{what} went", parts)


def _diverged(grid: Grid, rate: float) -> str:
    """Which seeds of which arm diverged, and when."""
    parts = []
    for arm in grid.arms:
        lost = [cell for cell in grid.at(arm, rate) if cell.manifest["state"] == "diverged"]
        if lost:
            when = steps_span([int(cell.manifest["step"]) for cell in lost])
            every = plural(len(grid.seeds), "seed")
            parts.append(f"{arm.phrase} at {when} ({len(lost)} of {every})")
    return sentence("Training diverged", parts)


def _best_rates(grid: Grid, summary: Summary) -> str:
    """The learning rate that served each arm best, and how well."""
    parts = [
        f"{number(best.lr)} {arm.phrase} ({summary.show(final.mean)})"
        for arm in grid.arms
        if (best := summary.best_outcome(arm.name)) and (final := best.final)
    ]
    return sentence(f"Best final {summary.measure} at learning rate", parts)
