"""Weight norms and effective learning rates."""

from __future__ import annotations

import numpy as np

from batchnorm.report.charts.panels import layered
from batchnorm.report.charts.sentences import ends, sentence
from batchnorm.report.grid import Grid, measured_layers
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart
from batchnorm.report.words import number

__all__ = ["effective_learning_rate", "norm"]


def norm(grid: Grid) -> Chart:
    """The norm of each layer's weight."""
    quantity = "weight/norm"
    return layered(
        grid,
        quantity,
        id="weight-norm",
        title="Weight norms",
        how="Behind a normalization the scale of a weight does not change what the network "
        "computes, only how large a step of the same length is in comparison.",
        source=f"{P1}, Section 3.3",
        y=Axis("norm of the layer's weight"),
        find=lambda grid, rate: _growth(grid, rate, quantity, "weight norms"),
    )


def effective_learning_rate(grid: Grid) -> Chart:
    """How fast the direction of each layer's weight turns."""
    quantity = "weight/effective_lr"
    return layered(
        grid,
        quantity,
        id="effective-rate",
        title="Effective learning rate",
        how="Learning rate divided by the squared weight norm: where a normalization follows the "
        "layer, this decides how fast the direction of the weight turns.",
        source="van Laarhoven 2017, arXiv 1706.05350",
        y=Axis("learning rate / ‖w‖²", type="log"),
        find=lambda grid, rate: _growth(grid, rate, quantity, "effective learning rates"),
    )


def _growth(grid: Grid, rate: float, quantity: str, what: str) -> str:
    """By what a quantity was multiplied from start to end."""
    parts = []
    for arm in grid.arms:
        factors = [
            went[1] / went[0]
            for layer in measured_layers(grid, quantity)
            if (went := ends(grid.series(arm, rate, quantity, layer))) and went[0]
        ]
        if factors:
            parts.append(f"{number(float(np.median(factors)), 2)} {arm.phrase}")
    return sentence(f"From start to end, {what} were multiplied by (median layer)", parts)
