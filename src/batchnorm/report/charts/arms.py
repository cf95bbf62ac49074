"""Arms that differ in more than the norm: how their accuracy rises, and where it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from batchnorm.records import Cell, Run
from batchnorm.report.grid import across, finite
from batchnorm.report.spec import Axis, Chart, End, Line, Panel, Rule
from batchnorm.verdicts import interval

__all__ = ["best_accuracies", "rising_accuracies"]

_HALF = 0.3
"""Half the width of an arm's interval, where two arms are one apart."""


def _guessing(run: Run) -> list[Rule]:
    classes = {int(cell.manifest["task"]["outputs"]) for cell in run.cells}
    return [Rule(1 / max(classes), "guessing")] if classes else []


def _curve(index: int, cells: Sequence[Cell]) -> Line | None:
    series = across([cell.series("test/accuracy") for cell in cells])
    if series is None:
        return None
    ends = []
    for cell in cells:
        if cell.manifest["state"] == "diverged":
            step = float(cell.manifest["step"])
            before = finite(series.y[series.x <= step])
            ends += [End(step, float(before[-1]))] if len(before) else []
    several = len(cells) > 1
    return Line(
        index,
        series.x,
        series.y,
        series.low if several else None,
        series.high if several else None,
        ends,
    )


def rising_accuracies(
    run: Run, arms: Sequence[str], groups: Mapping[str, Sequence[str]], source: str, finding: str
) -> Chart:
    """Test accuracy over the steps, a panel for each group of arms.

    Args:
        run: cells whose setting ``arm`` is one of ``arms``.
        arms: all arms, in the order of the study's lines.
        groups: the arms of each panel, by its title.
        source: where such a figure is from.
        finding: what is to be said of it.
    """
    drawn = {arm: _curve(i, _started(run, arm)) for i, arm in enumerate(arms)}
    panels = []
    for title, names in groups.items():
        lines = [line for name in names if (line := drawn[name])]
        if lines:
            panels.append(Panel(title, lines, domain=(0.0, 1.0), rules=_guessing(run)))
    return Chart(
        id="accuracy",
        title="Test accuracy",
        how="Higher is better; compare how many steps each line needs to reach the best of the "
        "network without normalization. A mark stands where a seed diverged.",
        source=source,
        x=Axis("step"),
        y=Axis("test accuracy", percent=True),
        panels=panels,
        band="smallest to largest over the seeds",
        columns=2,
        findings={"": finding},
    )


def best_accuracies(run: Run, arms: Sequence[str], names: Sequence[str], source: str) -> Chart:
    """The best test accuracy of each arm with its interval over the seeds.

    Args:
        run: cells whose setting ``arm`` is one of ``arms``.
        arms: all arms, in the order of the study's lines.
        names: what the axis calls them.
        source: where such a figure is from.
    """
    lines = []
    for index, arm in enumerate(arms):
        courses = [cell.series("test/accuracy") for cell in _started(run, arm)]
        best = [max(course.values()) for course in courses if course]
        if best:
            span = interval(best)
            known = math.isfinite(span.low)
            x = np.array([index + 1 - _HALF, index + 1 + _HALF])
            low, high = (np.full(2, end) if known else None for end in (span.low, span.high))
            lines.append(Line(index, x, np.full(2, span.mean), low, high))
    return Chart(
        id="best",
        title="Best test accuracy",
        how="The highest accuracy that each network had at any measurement: mean over the seeds.",
        source=source,
        x=Axis("network", names=list(names), domain=(0.5, len(arms) + 0.5)),
        y=Axis("best test accuracy", percent=True),
        panels=[Panel("", lines, domain=(0.0, 1.0), rules=_guessing(run))] if lines else [],
        band="95% interval of the mean over the seeds",
    )


def _started(run: Run, arm: str) -> list[Cell]:
    return [cell for cell in run.cells if cell.settings["arm"] == arm]
