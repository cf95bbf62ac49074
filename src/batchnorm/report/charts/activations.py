"""What the nonlinearities receive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from batchnorm.report.charts.panels import (
    arm_line,
    nearest_steps,
    overview,
    panels_by_rate,
    steps_axis,
)
from batchnorm.report.charts.sentences import at_each_rate, ends, sentence
from batchnorm.report.grid import Arm, Grid, finite, measured_layers
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.report.words import count, number

__all__ = ["histograms", "moments", "percentiles"]

_BINS = 32


def percentiles(grid: Grid) -> Chart:
    """Three percentiles of one unit over the steps, as [P1] Figure 1(b, c)."""
    layers = measured_layers(grid, "activation/p50")
    hidden = _hidden(layers)

    def draw(arm: Arm, rate: float, layer: str) -> Line | None:
        low, middle, high = (
            grid.series(arm, rate, f"activation/{name}", layer) for name in ("p15", "p50", "p85")
        )
        if low is None or middle is None or high is None:
            return None
        return arm_line(grid, arm, rate, middle, (low.y, high.y))

    return Chart(
        id="percentiles",
        title="What one unit receives: 15th, 50th and 85th percentile",
        how="The line is the median over the batch of the input of one unit's nonlinearity, the "
        "band reaches from the 15th to the 85th percentile (means over the seeds); where they "
        "wander, the unit has to learn from a moving target.",
        source=f"{P1}, Figure 1(b, c)",
        x=steps_axis(grid),
        y=Axis("input of the unit's nonlinearity"),
        panels=_panels_by_arm(grid, layers, draw),
        band="15th to 85th percentile",
        columns=len(grid.arms),
        overview=overview(layers, hidden),
        findings=at_each_rate(grid, lambda grid, rate: _wandering(grid, rate, hidden[-1]))
        if layers
        else {},
    )


def moments(grid: Grid) -> Chart:
    """Mean and standard deviation of all units over the steps."""
    layers = measured_layers(grid, "activation/mean")
    hidden = _hidden(layers)

    def draw(arm: Arm, rate: float, layer: str) -> Line | None:
        mean = grid.series(arm, rate, "activation/mean", layer)
        std = grid.series(arm, rate, "activation/std", layer)
        if mean is None or std is None:
            return None
        return arm_line(grid, arm, rate, mean, (mean.y - std.y, mean.y + std.y))

    return Chart(
        id="moments",
        title="What all units of a layer receive: mean and standard deviation",
        how="The line is the mean over the batch and all units of the inputs of the nonlinearity, "
        "the band one standard deviation to each side (means over the seeds); a band that grows "
        "wide drives a saturating unit to where its gradient vanishes.",
        source=f"{P1}, Section 3",
        x=steps_axis(grid),
        y=Axis("inputs of the nonlinearity"),
        panels=_panels_by_arm(grid, layers, draw),
        band="mean − to mean + one standard deviation",
        columns=len(grid.arms),
        overview=overview(layers, hidden[-1:]),
        findings=at_each_rate(grid, lambda grid, rate: _widening(grid, rate, hidden[-1]))
        if layers
        else {},
    )


def histograms(grid: Grid) -> Chart:
    """All values of a layer at the start, in the middle and at the end of training."""
    layers = measured_layers(grid, "activation/low")

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            cells = [cell for arm in grid.arms for cell in grid.at(arm, rate)]
            steps = {step for cell in cells for step in cell.series("activation/low", layer)}
            for step in nearest_steps(steps, (0, 0.5, 1)):
                lines = [
                    outline
                    for arm in grid.arms
                    if (outline := _outline(grid, arm, rate, layer, step))
                ]
                title = f"layer {layer}, step {count(step)}"
                yield Panel(title, lines, rate=i, layer=layer, domain=(0.0, 1.05))

    return Chart(
        id="histograms",
        title="How the inputs of the nonlinearities are distributed",
        how="Start, middle and end of training, for the first seed: each outline is the histogram "
        "of all the layer's values in one batch, scaled so that its tallest bin is 1; compare "
        "how wide the outlines are and where they stand.",
        source=f"after {P1}, Section 3",
        x=Axis("input of the nonlinearity"),
        y=Axis("frequency, tallest bin = 1"),
        panels=panels_by_rate(grid, panels),
        shape="step",
        columns=3,
        overview=overview(layers, _hidden(layers)[-1:]),
    )


def _hidden(layers: list[str]) -> list[str]:
    """All but the output layer, unless that is the only one."""
    return layers[:-1] or layers


def _panels_by_arm(
    grid: Grid, layers: Sequence[str], draw: Callable[[Arm, float, str], Line | None]
) -> list[Panel]:
    """One panel an arm and a layer; those of a layer share their axis."""

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            drawn = [(arm, line) for arm in grid.arms if (line := draw(arm, rate, layer))]
            covers = fit([line for _, line in drawn])
            for arm, line in drawn:
                title = f"layer {layer}, {arm.label}"
                yield Panel(title, [line], rate=i, layer=layer, domain=covers)

    return panels_by_rate(grid, panels)


def _outline(grid: Grid, arm: Arm, rate: float, layer: str, step: int) -> Line | None:
    """The histogram of the first seed that has one at this step."""
    for cell in grid.at(arm, rate):
        low = cell.series("activation/low", layer).get(step, math.nan)
        high = cell.series("activation/high", layer).get(step, math.nan)
        shares = [
            cell.series("activation/histogram", layer, i).get(step, 0.0) for i in range(_BINS)
        ]
        if math.isfinite(low) and math.isfinite(high) and max(shares) > 0:
            heights = np.array([*shares, 0.0]) / max(shares)
            return Line(grid.arms.index(arm), np.linspace(low, high, _BINS + 1), heights)
    return None


def _wandering(grid: Grid, rate: float, layer: str) -> str:
    """How far the median of the one unit wandered, and where its band ended."""
    parts = []
    for arm in grid.arms:
        middle = grid.series(arm, rate, "activation/p50", layer)
        low = ends(grid.series(arm, rate, "activation/p15", layer))
        high = ends(grid.series(arm, rate, "activation/p85", layer))
        if middle and low and high and len(medians := finite(middle.y)):
            wandered = f"between {number(medians.min(), 2)} and {number(medians.max(), 2)}"
            end = f"from {number(low[1], 2)} to {number(high[1], 2)}"
            parts.append(
                f"{arm.phrase} the median moved {wandered}, and the band ended reaching {end}"
            )
    return f"In layer {layer}, {'; '.join(parts)}." if parts else ""


def _widening(grid: Grid, rate: float, layer: str) -> str:
    """How the standard deviation of a layer changed from start to end."""
    parts = [
        f"from {number(went[0], 2)} to {number(went[1], 2)} {arm.phrase}"
        for arm in grid.arms
        if (went := ends(grid.series(arm, rate, "activation/std", layer)))
    ]
    return sentence(f"In layer {layer}, the standard deviation over all units went", parts)
