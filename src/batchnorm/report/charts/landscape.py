"""The loss landscape along the gradient as [P2] Figure 4 shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from batchnorm.report.charts.panels import (
    arm_line,
    panels_by_rate,
    seed_lines,
    seeds_band,
    steps_axis,
)
from batchnorm.report.charts.sentences import at_each_rate, comparison, median_by_arm, sentence
from batchnorm.report.grid import Arm, Grid, Vector, finite
from batchnorm.report.papers import P2
from batchnorm.report.spec import Axis, Chart, Line, Panel, Rule, fit
from batchnorm.report.words import number, span

__all__ = ["loss_variation", "predictiveness", "smoothness"]

_ALONG = "smallest to largest along the gradient"


def loss_variation(grid: Grid) -> Chart:
    """The losses found along the gradient."""
    return Chart(
        id="loss-variation",
        title="Loss along the gradient",
        how="From each step the network tries shorter and longer steps along the gradient: the "
        "band holds all losses it finds (edges: means over the seeds); a narrow band means that "
        "the loss changes little and predictably.",
        source=f"{P2}, Figure 4(a)",
        x=steps_axis(grid),
        y=Axis("loss", type="log"),
        panels=_panels(grid, lambda rate: _range_lines(grid, rate, "landscape/loss")),
        band=_ALONG,
        findings=at_each_rate(grid, _largest_over_smallest),
    )


def predictiveness(grid: Grid) -> Chart:
    """How far the gradients found along the gradient are from it."""
    return Chart(
        id="predictiveness",
        title="Change of the gradient along the gradient",
        how="How far the gradient found there is from the gradient here (edges: means over the "
        "seeds); the lower, the longer the gradient remains a good guide.",
        source=f"{P2}, Figure 4(b)",
        x=steps_axis(grid),
        y=Axis("‖∇L(θ) − ∇L(θ − ηg)‖₂", type="log"),
        panels=_panels(grid, lambda rate: _range_lines(grid, rate, "landscape/gradient")),
        band=_ALONG,
        findings=at_each_rate(grid, _upper_edge),
    )


def smoothness(grid: Grid) -> Chart:
    """The largest change of the gradient by the distance walked."""
    descent = any(cell.settings["optimizer"] == "sgd" for cell in grid.cells)

    def rules(rate: float) -> list[Rule]:
        return [Rule(2 / rate, f"2 / learning rate = {number(2 / rate)}")] if descent else []

    edge = (
        " Plain gradient descent tends to work its way up to the dotted line, 2 divided by the "
        "learning rate (Cohen et al. 2021)."
        if descent
        else ""
    )
    return Chart(
        id="smoothness",
        title="Effective smoothness",
        how="The largest change of the gradient divided by the distance walked: the lower and the "
        f"steadier, the smoother the landscape along the way.{edge}",
        source=f"{P2}, Figure 4(c)",
        x=steps_axis(grid),
        y=Axis("effective β", type="log"),
        panels=_panels(grid, lambda rate: seed_lines(grid, rate, "landscape/smoothness"), rules),
        band=seeds_band(grid),
        findings=at_each_rate(grid, _median_and_range),
    )


def _panels(
    grid: Grid,
    draw: Callable[[float], list[Line]],
    rules: Callable[[float], list[Rule]] = lambda rate: [],
) -> list[Panel]:
    def panels(i: int, rate: float) -> Iterable[Panel]:
        lines = draw(rate)
        yield Panel("", lines, rate=i, domain=fit(lines, log=True), rules=rules(rate))

    return panels_by_rate(grid, panels)


def _range_lines(grid: Grid, rate: float, quantity: str) -> list[Line]:
    """The band of each arm from the smallest to the largest value along the gradient."""
    lines = []
    for arm in grid.arms:
        low = grid.series(arm, rate, f"{quantity}_low")
        high = grid.series(arm, rate, f"{quantity}_high")
        if low and high:
            lines.append(arm_line(grid, arm, rate, high, (low.y, high.y), middle=False))
    return lines


def _largest_over_smallest(grid: Grid, rate: float) -> str:
    """The median over steps of largest loss / smallest loss."""

    def variation(arm: Arm) -> Vector | None:
        low = grid.series(arm, rate, "landscape/loss_low")
        high = grid.series(arm, rate, "landscape/loss_high")
        if low is None or high is None:
            return None
        positive = low.y > 0
        return np.divide(high.y, low.y, out=np.full_like(low.y, np.nan), where=positive)

    medians = median_by_arm(grid, variation)
    said = _medians("Largest loss divided by smallest", medians)
    above_one = {arm: value - 1 for arm, value in medians.items()}
    return said + comparison(grid, rate, above_one, "The variation")


def _upper_edge(grid: Grid, rate: float) -> str:
    """The median over steps of the upper edge."""

    def upper(arm: Arm) -> Vector | None:
        series = grid.series(arm, rate, "landscape/gradient_high")
        return series.y if series else None

    medians = median_by_arm(grid, upper)
    said = _medians("Upper edge of the band", medians)
    return said + comparison(grid, rate, medians, "The change of the gradient")


def _medians(what: str, medians: dict[Arm, float]) -> str:
    parts = [f"{number(value)} {arm.phrase}" for arm, value in medians.items()]
    return sentence(f"{what}, median over the steps:", parts)


def _median_and_range(grid: Grid, rate: float) -> str:
    """Median and range over the steps: in [P2] only the range tells the arms apart."""
    parts = []
    for arm in grid.arms:
        series = grid.series(arm, rate, "landscape/smoothness")
        values = finite(series.y) if series else np.array([])
        if len(values):
            low, high = np.quantile(values, [0.05, 0.95])
            inner = span(number(low, 2), number(high, 2))
            parts.append(f"{number(float(np.median(values)))} {arm.phrase} (90% of steps: {inner})")
    return sentence("Median over the steps:", parts)
