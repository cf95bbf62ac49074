"""Internal covariate shift as [P2] defines it."""

from __future__ import annotations

import numpy as np

from batchnorm.report.charts.panels import layered
from batchnorm.report.charts.sentences import comparison, median_by_arm, sentence
from batchnorm.report.grid import Arm, Grid, Vector, measured_layers
from batchnorm.report.papers import P2
from batchnorm.report.spec import Axis, Chart
from batchnorm.report.words import number

__all__ = ["cosine", "distance"]

_DEFINITION = (
    "The gradient of a layer is computed twice on the same batch, before (G) and after (G′) the "
    "layers in front of it were updated"
)
_COMPARED = "By this measure the shift"


def distance(grid: Grid) -> Chart:
    """How far the two gradients of a layer are apart."""
    return layered(
        grid,
        "shift/l2",
        id="shift-distance",
        title="Internal covariate shift: distance of the gradients",
        how=f"{_DEFINITION}: 0 means that their update made no difference to it. Larger gradients "
        "are further apart, which the angle below does not depend on.",
        source=f"{P2}, Definition 2.1 and Figure 3",
        y=Axis("‖G − G′‖₂"),
        find=_median_distance,
        skip_first=True,
    )


def cosine(grid: Grid) -> Chart:
    """Whether the two gradients of a layer point the same way."""
    return layered(
        grid,
        "shift/cosine",
        id="shift-cosine",
        title="Internal covariate shift: angle between the gradients",
        how=f"{_DEFINITION}: 1 means that it still points the same way, 0 that it points anywhere.",
        source=f"{P2}, Definition 2.1 and Figure 3",
        y=Axis("cosine of ∠(G, G′)"),
        find=_median_cosine,
        skip_first=True,
        domain=(-1.0, 1.05),
    )


def _median_distance(grid: Grid, rate: float) -> str:
    medians = _medians(grid, rate, "shift/l2")
    return _said("distance", medians) + comparison(grid, rate, medians, _COMPARED)


def _median_cosine(grid: Grid, rate: float) -> str:
    medians = _medians(grid, rate, "shift/cosine")
    # A larger cosine is a smaller shift: compare the distance from 1.
    from_one = {arm: 1 - value for arm, value in medians.items()}
    return _said("cosine", medians) + comparison(grid, rate, from_one, _COMPARED)


def _said(what: str, medians: dict[Arm, float]) -> str:
    return sentence(
        f"Median {what} over all steps and all layers but the first:",
        [f"{number(value, 2)} {arm.phrase}" for arm, value in medians.items()],
    )


def _medians(grid: Grid, rate: float, quantity: str) -> dict[Arm, float]:
    """The median over steps and layers; the first layer has no layer before it to shift it."""
    layers = measured_layers(grid, quantity)[1:]

    def pooled(arm: Arm) -> Vector | None:
        found = [grid.series(arm, rate, quantity, layer) for layer in layers]
        values = [series.y for series in found if series]
        return np.concatenate(values) if values else None

    return median_by_arm(grid, pooled)
