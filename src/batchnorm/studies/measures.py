"""What the measures of several studies have in common: pairs of arms, and curves in one number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.records import Cell, Run
from batchnorm.verdicts import CannotTellError

__all__ = ["early_mean", "instability", "last", "pairs", "values"]


def pairs(
    run: Run, norms: tuple[str, str] = ("none", "batch"), **settings: Any
) -> dict[int, tuple[Cell, Cell]]:
    """The cells of two norms that ran to their end, by the seeds that both have."""
    one, other = (run.by_seed(norm=norm, **settings) for norm in norms)
    return {seed: (one[seed], other[seed]) for seed in one if seed in other}


def values(
    cell: Cell, quantity: str, layers: Sequence[str] = ("",), *, after: int = 0
) -> NDArray[np.float64]:
    """The finite values of a quantity from the step ``after`` on, over all ``layers``.

    Raises:
        CannotTellError: there are none.
    """
    found = np.array(
        [
            value
            for layer in layers
            for step, value in cell.series(quantity, layer).items()
            if step >= after
        ]
    )
    finite: NDArray[np.float64] = found[np.isfinite(found)]
    if not len(finite):
        raise CannotTellError(f"Cell {cell.folder.name} has no finite {quantity}")
    return finite


def last(cell: Cell, quantity: str) -> float:
    """The last value of a quantity that was recorded."""
    series = cell.series(quantity)
    if not series:
        raise CannotTellError(f"Cell {cell.folder.name} has no {quantity}")
    return series[max(series)]


def early_mean(cell: Cell, quantity: str, share: float = 1.0) -> float:
    """The mean over time of a quantity in the first ``share`` of the run.

    Of an accuracy it is high where the accuracy rises early. What a network had last before it
    diverged counts to the end.
    """
    end = share * int(cell.settings["steps"])
    series = {step: v for step, v in sorted(cell.series(quantity).items()) if step <= end}
    if len(series) < 2:
        raise CannotTellError(f"Cell {cell.folder.name} has no course of {quantity} to average")
    steps, reached = [*series, end], [*series.values(), [*series.values()][-1]]
    return float(np.trapezoid(reached, steps) / (end - steps[0]))


def instability(cell: Cell) -> float:
    """How far a unit's median moves between two measurements, in widths of its distribution."""
    steps = sorted(cell.series("activation/p50", cell.layers[0]))
    moves = []
    for layer in cell.layers[:-1]:
        low, middle, high = (cell.series(f"activation/{p}", layer) for p in ("p15", "p50", "p85"))
        for before, now in pairwise(steps):
            width = high[now] - low[now]
            if width > 0:
                moves.append(abs(middle[now] - middle[before]) / width)
    if not moves:
        raise CannotTellError(f"Cell {cell.folder.name} has no distributions to compare")
    return float(np.median(moves))
