"""What a chart shows, in a sentence derived from its numbers.

Every function takes the grid and a learning rate and returns a sentence, or nothing where there is
nothing to say. None of them claims what was not measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batchnorm.report.grid import Arm, Grid, Series, Vector, measured_layers
from batchnorm.report.headline import Summary
from batchnorm.report.words import count, join, number, percent, plural, ratio, span

__all__ = [
    "against_rate",
    "course",
    "depth",
    "diverged",
    "effective_rate",
    "gap",
    "loss_variation",
    "percentiles",
    "predictiveness",
    "shift",
    "smoothness",
    "spread",
    "weights",
]


def _finite(values: Vector) -> Vector:
    return values[np.isfinite(values)]


def _joined(parts: list[str], start: str, end: str = ".") -> str:
    return f"{start}{join(parts)}{end}" if parts else ""


def _ends(series: Series | None) -> tuple[float, float] | None:
    """First and last finite value of a series."""
    values = _finite(series.y) if series else np.array([])
    return (float(values[0]), float(values[-1])) if len(values) else None


def _relation(grid: Grid, rate: float, values: list[float], than: list[Arm], what: str) -> str:
    """How two numbers compare, where both arms went the whole way; nothing for more or fewer."""
    if len(values) != 2 or min(values) < 0 or not max(values):
        return ""
    if any(cell.manifest["state"] != "done" for arm in than for cell in grid.at(arm, rate)):
        return ""
    (one, two), (first, second) = values, than
    if min(values) >= 0.8 * max(values):
        return f" {what} is about the same in both."
    larger, smaller = (first, second) if one > two else (second, first)
    by = f" ({ratio(max(values) / min(values))}×)" if min(values) else ""
    return f" {what} is larger {larger.phrase} than {smaller.phrase}{by}."


def diverged(grid: Grid, rate: float) -> str:
    """Which seeds of which arm diverged, and when."""
    parts = []
    for arm in grid.arms:
        lost = [cell for cell in grid.at(arm, rate) if cell.manifest["state"] == "diverged"]
        if lost:
            steps = sorted(int(cell.manifest["step"]) for cell in lost)
            when = span(count(steps[0]), count(steps[-1]))
            word = "step" if steps[0] == steps[-1] else "steps"
            every = plural(len(grid.seeds), "seed")
            parts.append(f"{arm.phrase} at {word} {when} ({len(lost)} of {every})")
    return _joined(parts, "Training diverged ", ".")


def course(grid: Grid, rate: float, quantity: str, what: str, *, share: bool = False) -> str:
    """From where to where a quantity of the whole network went."""
    show: Callable[[float], str] = percent if share else number
    parts = []
    for arm in grid.arms:
        if ends := _ends(grid.series(arm, rate, quantity)):
            parts.append(f"from {show(ends[0])} to {show(ends[1])} {arm.phrase}")
    return _joined(parts, f"{what} went ")


def against_rate(summary: Summary, grid: Grid) -> str:
    """The learning rate that served each arm best, and how well."""
    parts = []
    for arm in grid.arms:
        rate = summary.best_rate[arm.name]
        final = summary.outcome(arm.name, rate).final if rate is not None else None
        if rate is not None and final:
            parts.append(f"{number(rate)} {arm.phrase} ({summary.show(final.mean)})")
    return _joined(parts, f"Best final {summary.measure} at learning rate ")


def percentiles(grid: Grid, rate: float, layer: str) -> str:
    """How far the median of the one unit wandered, and where its band ended."""
    parts = []
    for arm in grid.arms:
        middle = grid.series(arm, rate, "activation/p50", layer)
        low = _ends(grid.series(arm, rate, "activation/p15", layer))
        high = _ends(grid.series(arm, rate, "activation/p85", layer))
        if middle and low and high and len(moved := _finite(middle.y)):
            wandered = f"between {number(moved.min(), 2)} and {number(moved.max(), 2)}"
            end = f"from {number(low[1], 2)} to {number(high[1], 2)}"
            parts.append(
                f"{arm.phrase} the median moved {wandered}, and the band ended reaching {end}"
            )
    return f"In layer {layer}, {'; '.join(parts)}." if parts else ""


def spread(grid: Grid, rate: float, layer: str) -> str:
    """How the standard deviation of a layer changed from start to end."""
    parts = []
    for arm in grid.arms:
        if ends := _ends(grid.series(arm, rate, "activation/std", layer)):
            parts.append(f"from {number(ends[0], 2)} to {number(ends[1], 2)} {arm.phrase}")
    return _joined(parts, f"In layer {layer}, the standard deviation over all units went ")


def depth(grid: Grid, rate: float) -> str:
    """The gradient of the first layer as a multiple of that of the last, at the start."""
    layers = measured_layers(grid, "gradient/norm")
    if len(layers) < 2:
        return ""
    parts = []
    for arm in grid.arms:
        first = _ends(grid.series(arm, rate, "gradient/norm", layers[0]))
        last = _ends(grid.series(arm, rate, "gradient/norm", layers[-1]))
        if first and last and last[0]:
            parts.append(f"{number(first[0] / last[0], 2)} {arm.phrase}")
    return _joined(
        parts,
        f"At the start, the gradient of the first layer ({layers[0]}) divided by that of the last "
        f"({layers[-1]}) is ",
    )


def shift(grid: Grid, rate: float, quantity: str) -> str:
    """The median over steps and layers; the first layer has no layer before it to shift it."""
    layers = measured_layers(grid, quantity)[1:]
    values, arms = [], []
    for arm in grid.arms:
        found = [grid.series(arm, rate, quantity, layer) for layer in layers]
        pooled = _finite(np.concatenate([s.y for s in found if s] or [np.array([])]))
        if len(pooled):
            values.append(float(np.median(pooled)))
            arms.append(arm)
    what = "cosine" if quantity.endswith("cosine") else "distance"
    parts = [f"{number(value, 2)} {arm.phrase}" for value, arm in zip(values, arms, strict=True)]
    said = _joined(parts, f"Median {what} over all steps and all layers but the first: ")
    if what == "cosine":
        # A larger cosine is a smaller shift: compare the distance from 1.
        return said + _relation(
            grid, rate, [1 - value for value in values], arms, "By this measure the shift"
        )
    return said + _relation(grid, rate, values, arms, "By this measure the shift")


def _median_of(
    grid: Grid, rate: float, measure: Callable[[Arm], Vector | None]
) -> tuple[list[float], list[Arm]]:
    values, arms = [], []
    for arm in grid.arms:
        found = measure(arm)
        if found is not None and len(finite := _finite(found)):
            values.append(float(np.median(finite)))
            arms.append(arm)
    return values, arms


def loss_variation(grid: Grid, rate: float) -> str:
    """The median over steps of largest loss / smallest loss."""

    def variation(arm: Arm) -> Vector | None:
        low = grid.series(arm, rate, "landscape/loss_low")
        high = grid.series(arm, rate, "landscape/loss_high")
        if low is None or high is None:
            return None
        positive = low.y > 0
        return np.divide(high.y, low.y, out=np.full_like(low.y, np.nan), where=positive)

    values, arms = _median_of(grid, rate, variation)
    parts = [f"{number(value)} {arm.phrase}" for value, arm in zip(values, arms, strict=True)]
    said = _joined(parts, "Largest loss divided by smallest, median over the steps: ")
    return said + _relation(grid, rate, [v - 1 for v in values], arms, "The variation")


def predictiveness(grid: Grid, rate: float) -> str:
    """The median over steps of the upper edge."""

    def upper(arm: Arm) -> Vector | None:
        series = grid.series(arm, rate, "landscape/gradient_high")
        return series.y if series else None

    values, arms = _median_of(grid, rate, upper)
    parts = [f"{number(value)} {arm.phrase}" for value, arm in zip(values, arms, strict=True)]
    said = _joined(parts, "Upper edge of the band, median over the steps: ")
    return said + _relation(grid, rate, values, arms, "The change of the gradient")


def smoothness(grid: Grid, rate: float) -> str:
    """Median and range over the steps: in [P2] only the range tells the arms apart."""
    parts = []
    for arm in grid.arms:
        series = grid.series(arm, rate, "landscape/smoothness")
        values = _finite(series.y) if series else np.array([])
        if len(values):
            low, high = np.quantile(values, [0.05, 0.95])
            inner = span(number(low, 2), number(high, 2))
            parts.append(f"{number(float(np.median(values)))} {arm.phrase} (90% of steps: {inner})")
    return _joined(parts, "Median over the steps: ")


def gap(grid: Grid, rate: float, quantity: str, what: str) -> str:
    """Where a distance between running and batch statistics ended, averaged over the layers."""
    parts = []
    for arm in grid.arms:
        found = [
            ends[1]
            for layer in measured_layers(grid, quantity)
            if (ends := _ends(grid.series(arm, rate, quantity, layer)))
        ]
        if found:
            parts.append(f"{number(float(np.mean(found)), 2)} {arm.phrase}")
    return _joined(parts, f"At the end, {what}, mean over the layers: ")


def _growth(grid: Grid, rate: float, quantity: str) -> list[str]:
    parts = []
    for arm in grid.arms:
        found = [
            ends[1] / ends[0]
            for layer in measured_layers(grid, quantity)
            if (ends := _ends(grid.series(arm, rate, quantity, layer))) and ends[0]
        ]
        if found:
            parts.append(f"{number(float(np.median(found)), 2)} {arm.phrase}")
    return parts


def weights(grid: Grid, rate: float) -> str:
    """By what the weight norms were multiplied from start to end."""
    parts = _growth(grid, rate, "weight/norm")
    return _joined(parts, "From start to end, weight norms were multiplied by (median layer) ")


def effective_rate(grid: Grid, rate: float) -> str:
    """By what the effective learning rates were multiplied from start to end."""
    parts = _growth(grid, rate, "weight/effective_lr")
    return _joined(
        parts, "From start to end, effective learning rates were multiplied by (median layer) "
    )
