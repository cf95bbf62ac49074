"""Running statistics against those of the batch."""

from __future__ import annotations

import numpy as np

from batchnorm.report.charts.panels import layered
from batchnorm.report.charts.sentences import ends, sentence
from batchnorm.report.grid import Grid, measured_layers
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart
from batchnorm.report.words import number

__all__ = ["mean", "variance"]


def mean(grid: Grid) -> Chart:
    """How far the running mean is from that of the batch."""
    quantity = "running/mean_error"
    return layered(
        grid,
        quantity,
        id="running-mean",
        title="Running mean against batch mean",
        how="How far the mean that evaluation will use is from that of the current batch, in "
        "standard deviations of the batch; it cannot reach 0, because no two batches are alike.",
        source=f"{P1}, Algorithm 2",
        y=Axis("distance in standard deviations", type="log"),
        find=lambda grid, rate: _end(grid, rate, quantity, "distance in standard deviations"),
    )


def variance(grid: Grid) -> Chart:
    """How far the running variance is from that of the batch."""
    quantity = "running/log_variance_ratio"
    return layered(
        grid,
        quantity,
        id="running-variance",
        title="Running variance against batch variance",
        how="Logarithm of the running variance divided by that of the current batch: 0 means "
        "equal, above 0 that evaluation divides by too much, below 0 by too little.",
        source=f"{P1}, Algorithm 2",
        y=Axis("ln(running variance / batch variance)"),
        find=lambda grid, rate: _end(grid, rate, quantity, "logarithm of the ratio"),
    )


def _end(grid: Grid, rate: float, quantity: str, what: str) -> str:
    """Where a distance between running and batch statistics ended, averaged over the layers."""
    parts = []
    for arm in grid.arms:
        last = [
            went[1]
            for layer in measured_layers(grid, quantity)
            if (went := ends(grid.series(arm, rate, quantity, layer)))
        ]
        if last:
            parts.append(f"{number(float(np.mean(last)), 2)} {arm.phrase}")
    return sentence(f"At the end, {what}, mean over the layers:", parts)
