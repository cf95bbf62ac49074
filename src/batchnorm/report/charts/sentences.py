"""Sentences over the arms, derived from numbers; nothing where there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from batchnorm.report.grid import Arm, Grid, Series, Vector, finite
from batchnorm.report.words import join, ratio

__all__ = ["Find", "at_each_rate", "comparison", "ends", "median_by_arm", "sentence"]

Find = Callable[[Grid, float], str]
"""What a chart shows at a learning rate, as one or more sentences."""


def at_each_rate(grid: Grid, find: Find) -> dict[str, str]:
    """What was found, by the position of the learning rate."""
    said = {str(i): find(grid, rate) for i, rate in enumerate(grid.rates)}
    return {key: found for key, found in said.items() if found}


def sentence(start: str, parts: Sequence[str]) -> str:
    """``start a, b and c.``; nothing without parts."""
    return f"{start} {join(parts)}." if parts else ""


def ends(series: Series | None) -> tuple[float, float] | None:
    """First and last finite value of a series."""
    values = finite(series.y) if series else np.array([])
    return (float(values[0]), float(values[-1])) if len(values) else None


def median_by_arm(grid: Grid, measure: Callable[[Arm], Vector | None]) -> dict[Arm, float]:
    """The median of what is finite, for each arm that has such values."""
    values = {arm: finite(found) for arm in grid.arms if (found := measure(arm)) is not None}
    return {arm: float(np.median(some)) for arm, some in values.items() if len(some)}


def comparison(grid: Grid, rate: float, values: Mapping[Arm, float], what: str) -> str:
    """How two arms compare, where both went the whole way; nothing for more or fewer."""
    if len(values) != 2 or min(values.values()) < 0 or not max(values.values()):
        return ""
    if any(cell.manifest["state"] != "done" for arm in values for cell in grid.at(arm, rate)):
        return ""
    (first, one), (second, two) = values.items()
    low, high = min(one, two), max(one, two)
    if low >= 0.8 * high:
        return f" {what} is about the same in both."
    larger, smaller = (first, second) if one > two else (second, first)
    by = f" ({ratio(high / low)}×)" if low else ""
    return f" {what} is larger {larger.phrase} than {smaller.phrase}{by}."
