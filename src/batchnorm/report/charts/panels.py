"""What the charts are built of: lines of the arms, panels of rates and layers, and their axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from batchnorm.report.charts.sentences import Find, at_each_rate
from batchnorm.report.grid import Arm, Grid, Series, Vector, finite, measured_layers
from batchnorm.report.spec import Axis, Chart, End, Line, Panel, fit

__all__ = [
    "arm_line",
    "layered",
    "nearest_steps",
    "overview",
    "panels_by_rate",
    "seed_lines",
    "seeds_band",
    "steps_axis",
]


def steps_axis(grid: Grid) -> Axis:
    """The axis of training steps."""
    return Axis("step", domain=(0.0, float(max(grid.steps, 1))))


def seeds_band(grid: Grid) -> str:
    """What a band over the seeds shows; nothing where a single seed leaves no band."""
    return "smallest to largest over the seeds" if len(grid.seeds) > 1 else ""


def arm_line(
    grid: Grid,
    arm: Arm,
    rate: float,
    series: Series,
    band: tuple[Vector, Vector] | None,
    *,
    middle: bool = True,
) -> Line:
    """One arm, marked on ``series`` where a seed diverged; without ``middle`` the band alone."""
    ends = []
    for cell in grid.at(arm, rate):
        if cell.manifest["state"] == "diverged":
            step = float(cell.manifest["step"])
            before = finite(series.y[series.x <= step])
            if len(before):
                ends.append(End(step, float(before[-1])))
    low, high = band or (None, None)
    return Line(grid.arms.index(arm), series.x, series.y if middle else None, low, high, ends)


def seed_lines(grid: Grid, rate: float, quantity: str, layer: str = "") -> list[Line]:
    """The mean of a quantity over the seeds with their range, for each arm that has it."""
    several = len(grid.seeds) > 1
    return [
        arm_line(grid, arm, rate, series, (series.low, series.high) if several else None)
        for arm in grid.arms
        if (series := grid.series(arm, rate, quantity, layer))
    ]


def panels_by_rate(grid: Grid, make: Callable[[int, float], Iterable[Panel]]) -> list[Panel]:
    """The panels of every learning rate that have something to show."""
    panels = [panel for i, rate in enumerate(grid.rates) for panel in make(i, rate)]
    return [panel for panel in panels if panel.lines]


def overview(layers: Sequence[str], shown: Sequence[str]) -> list[str] | None:
    """``shown`` from the last, at most three of them; ``None`` where that is all there is."""
    if len(shown) > 3:
        shown = [shown[0], shown[len(shown) // 2], shown[-1]]
    return None if len(shown) == len(layers) else list(reversed(shown))


def nearest_steps(steps: Collection[int], fractions: Sequence[float]) -> list[int]:
    """The recorded steps nearest to fractions of the way, without repetition."""
    if not steps:
        return []
    last = max(steps)
    ordered = sorted(steps)
    nearest = [min(ordered, key=lambda step: abs(step - part * last)) for part in fractions]
    return list(dict.fromkeys(nearest))


def layered(
    grid: Grid,
    quantity: str,
    *,
    id: str,
    title: str,
    how: str,
    source: str,
    y: Axis,
    find: Find,
    skip_first: bool = False,
    domain: tuple[float, float] | None = None,
) -> Chart:
    """One quantity over the steps, one panel a layer, one line an arm."""
    layers = measured_layers(grid, quantity)
    shown = overview(layers, layers[1:] if skip_first and len(layers) > 1 else layers)

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            lines = seed_lines(grid, rate, quantity, layer)
            covers = domain or fit(lines, log=y.type == "log")
            yield Panel(f"layer {layer}", lines, rate=i, layer=layer, domain=covers)

    return Chart(
        id=id,
        title=title,
        how=how,
        source=source,
        x=steps_axis(grid),
        y=y,
        panels=panels_by_rate(grid, panels),
        band=seeds_band(grid),
        columns=min(3, len(shown or layers)),
        overview=shown,
        findings=at_each_rate(grid, find),
    )
