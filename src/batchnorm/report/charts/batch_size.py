"""Where networks ended, against the size of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from batchnorm.records import Cell, Run
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit

__all__ = ["against_batch_size"]


def against_batch_size(
    run: Run,
    panels: Mapping[str, Callable[[Cell], float]],
    place: Callable[[Cell], tuple[int, int]],
    *,
    id: str,
    title: str,
    how: str,
    source: str,
    y: Axis,
) -> Chart:
    """One number of each cell that ended, a panel each, by batch size.

    Args:
        run: the cells.
        panels: what each shows; a cell for which the number is not finite is left out.
        place: the line of a cell and where on the axis it stands.
        id: of the chart, as are the rest.
        title: its heading.
        how: how to read it.
        source: where it is from.
        y: its upright axis.
    """
    ended = [cell for cell in run.cells if cell.ended]
    sizes = sorted({place(cell)[1] for cell in ended})
    drawn = {name: _lines(ended, measure, place) for name, measure in panels.items()}
    covers = fit([line for lines in drawn.values() for line in lines])
    margin = (sizes[-1] / sizes[0]) ** 0.05 if sizes else 1.0  # no point on the frame
    return Chart(
        id=id,
        title=title,
        how=how,
        source=source,
        x=Axis(
            "batch size",
            type="log",
            ticks=[float(size) for size in sizes],
            domain=(sizes[0] / margin, sizes[-1] * margin) if len(sizes) > 1 else None,
        ),
        y=y,
        panels=[Panel(name, lines, domain=covers) for name, lines in drawn.items() if lines],
        band="smallest to largest over the seeds",
        dots=True,
        columns=min(2, len(drawn)),
    )


def _lines(
    cells: list[Cell], measure: Callable[[Cell], float], place: Callable[[Cell], tuple[int, int]]
) -> list[Line]:
    found: dict[int, dict[int, list[float]]] = {}
    for cell in cells:
        line, size = place(cell)
        if np.isfinite(value := measure(cell)):
            found.setdefault(line, {}).setdefault(size, []).append(value)
    lines = []
    for line, points in sorted(found.items()):
        values = [points[size] for size in sorted(points)]
        y, low, high = (np.array([f(one) for one in values]) for f in (np.mean, np.min, np.max))
        lines.append(Line(line, np.array(sorted(points), dtype=float), y, low, high))
    return lines
