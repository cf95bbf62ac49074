"""Size of the gradients by depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from batchnorm.report.charts.panels import nearest_steps, panels_by_rate, seeds_band
from batchnorm.report.charts.sentences import at_each_rate, ends, sentence
from batchnorm.report.grid import Grid, Series, measured_layers
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.report.words import count, number

__all__ = ["by_depth"]


def by_depth(grid: Grid) -> Chart:
    """The gradient norms of all layers side by side, at a few steps."""
    layers = measured_layers(grid, "gradient/norm")

    def panels(i: int, rate: float) -> Iterable[Panel]:
        norms = [
            {layer: grid.series(arm, rate, "gradient/norm", layer) for layer in layers}
            for arm in grid.arms
        ]
        steps = {
            int(step) for each in norms for series in each.values() if series for step in series.x
        }
        drawn = {}
        for step in nearest_steps(steps, (0, 0.1, 0.5, 1)):
            tried = [_across_layers(grid, index, each, step) for index, each in enumerate(norms)]
            drawn[step] = [line for line in tried if line]
        covers = fit([line for lines in drawn.values() for line in lines], log=True)
        for step, lines in drawn.items():
            yield Panel(f"step {count(step)}", lines, rate=i, domain=covers)

    return Chart(
        id="gradients",
        title="Gradient norms by depth",
        how="Norm of the gradient of each layer's weight, the first layer on the left; where a "
        "line falls steeply towards the left, the early layers hardly learn, and where it is "
        "level, all layers learn alike.",
        source=f"{P1}, Section 3.3",
        x=Axis("layer", names=layers),
        y=Axis("gradient norm", type="log"),
        panels=panels_by_rate(grid, panels),
        band=seeds_band(grid),
        dots=True,
        columns=4,
        findings=at_each_rate(grid, _first_over_last),
    )


def _across_layers(
    grid: Grid, index: int, norms: Mapping[str, Series | None], step: int
) -> Line | None:
    """The norms of one arm at one step; ``None`` where no layer has one."""
    table = np.full((3, len(norms)), math.nan)
    for place, series in enumerate(norms.values()):
        if series and len(at := np.flatnonzero(series.x == step)):
            table[:, place] = [values[at[0]] for values in (series.y, series.low, series.high)]
    y, low, high = table
    if not np.isfinite(y).any():
        return None
    band = (low, high) if len(grid.seeds) > 1 else (None, None)
    return Line(index, np.arange(1.0, len(norms) + 1), y, *band)


def _first_over_last(grid: Grid, rate: float) -> str:
    """The gradient of the first layer as a multiple of that of the last, at the start."""
    layers = measured_layers(grid, "gradient/norm")
    if len(layers) < 2:
        return ""
    parts = []
    for arm in grid.arms:
        first = ends(grid.series(arm, rate, "gradient/norm", layers[0]))
        last = ends(grid.series(arm, rate, "gradient/norm", layers[-1]))
        if first and last and last[0]:
            parts.append(f"{number(first[0] / last[0], 2)} {arm.phrase}")
    return sentence(
        f"At the start, the gradient of the first layer ({layers[0]}) divided by that of the last "
        f"({layers[-1]}) is",
        parts,
    )
