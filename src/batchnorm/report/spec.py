"""The form of a chart: built once, drawn by ``web/`` in the report and by matplotlib as PNG."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from batchnorm.report.grid import Vector, finite

__all__ = ["Axis", "Chart", "End", "Line", "Panel", "Rule", "fit", "plain"]

_DIGITS = 5
"""Significant digits kept of a plotted number: more than a screen can show."""


@dataclass(frozen=True)
class Axis:
    """One axis; ``names`` stand at 1, 2, …; ``percent``: the values are shares."""

    label: str
    type: Literal["linear", "log"] = "linear"
    ticks: list[float] | None = None
    names: list[str] | None = None
    percent: bool = False
    domain: tuple[float, float] | None = None


@dataclass(frozen=True)
class End:
    """Where a seed diverged: the mark stands there, on the line's last value."""

    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """One arm in one panel: a line, a band, or both."""

    arm: int
    x: Vector
    y: Vector | None = None
    low: Vector | None = None
    high: Vector | None = None
    ends: list[End] = field(default_factory=list)

    def thinned(self, most: int) -> Line:
        """The line with at most ``most`` points, each the mean of neighbours."""
        if len(self.x) <= most:
            return self
        groups = np.array_split(np.arange(len(self.x)), most)
        # A group stands at its middle step, except that a line keeps its first and last place.
        x = np.array([self.x[group[len(group) // 2]] for group in groups])
        x[0], x[-1] = self.x[0], self.x[-1]

        def means(values: Vector | None) -> Vector | None:
            if values is None:
                return None
            parts = [finite(values[group]) for group in groups]
            return np.array([part.mean() if len(part) else math.nan for part in parts])

        return Line(self.arm, x, means(self.y), means(self.low), means(self.high), self.ends)


@dataclass(frozen=True)
class Rule:
    """A horizontal line to compare with."""

    y: float
    label: str


@dataclass(frozen=True)
class Panel:
    """One set of axes; shown only for its learning rate and its layer, where it names one."""

    title: str
    lines: list[Line]
    rate: int | None = None
    layer: str | None = None
    domain: tuple[float, float] | None = None
    rules: list[Rule] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """Panels that show one thing, with what a reader needs to understand them.

    ``overview`` names the layers shown at first, the others being offered in a menu; ``None``
    shows all. ``findings`` says what was found, by the position of the learning rate, or under
    ``""`` for all of them. ``how`` explains how to read the chart and ``source`` where it is from.
    """

    id: str
    title: str
    how: str
    source: str
    x: Axis
    y: Axis
    panels: list[Panel]
    band: str = ""
    shape: Literal["line", "step"] = "line"
    dots: bool = False
    columns: int = 1
    overview: list[str] | None = None
    findings: dict[str, str] = field(default_factory=dict)

    def shown(self, rate: int) -> list[Panel]:
        """The panels that a reader sees first at a learning rate."""
        return [
            panel
            for panel in self.panels
            if panel.rate in (None, rate)
            and (self.overview is None or panel.layer is None or panel.layer in self.overview)
        ]

    def finding(self, rate: int) -> str:
        """What was found at a learning rate."""
        said = (self.findings.get(""), self.findings.get(str(rate)))
        return " ".join(part for part in said if part)

    def abridged(self) -> Chart:
        """The chart with the layers of its overview only."""
        if self.overview is None:
            return self
        panels = [panel for panel in self.panels if panel.layer in self.overview]
        note = "The other layers are left out here to keep the file small; the records have them."
        said = " ".join(filter(None, (self.findings.get(""), note)))
        return replace(self, panels=panels, overview=None, findings={**self.findings, "": said})

    def thinned(self, most: int) -> Chart:
        """The chart with at most ``most`` points a line."""
        panels = [
            replace(panel, lines=[line.thinned(most) for line in panel.lines])
            for panel in self.panels
        ]
        return replace(self, panels=panels)


def plain(thing: Any) -> Any:
    """A specification as JSON values: short numbers, ``null`` for what is not finite."""
    if isinstance(thing, np.ndarray):
        return [plain(value) for value in thing.tolist()]
    if isinstance(thing, float):
        if not math.isfinite(thing):
            return None
        return int(thing) if thing == int(thing) and abs(thing) < 1e15 else _short(thing)
    if isinstance(thing, (list, tuple)):
        return [plain(value) for value in thing]
    if isinstance(thing, dict):
        return {key: plain(value) for key, value in thing.items()}
    if hasattr(thing, "__dataclass_fields__"):
        values = {name: getattr(thing, name) for name in thing.__dataclass_fields__}
        return {
            name: plain(value)
            for name, value in values.items()
            if value is not None and value is not False
        }
    return thing


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def fit(lines: Iterable[Line], *, log: bool = False) -> tuple[float, float] | None:
    """What the y axis has to cover for all these lines; ``None`` where there is nothing.

    An arm that runs away would leave nothing to see of the others, so the axis ends where values
    lie far outside the range of most, and the lines are cut off there.
    """
    parts = [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    values = finite(np.concatenate(parts)) if parts else np.array([])
    if log:
        values = np.log10(values[values > 0])
    if not len(values):
        return None
    usual_low, usual_high = np.quantile(values, [0.05, 0.95])
    reach = max(2.0, usual_high - usual_low) if log else 5 * (usual_high - usual_low)
    low, high = float(values.min()), float(values.max())
    if reach:
        low, high = max(low, usual_low - reach), min(high, usual_high + reach)
    size = max(abs(low), abs(high))
    level = high - low <= 1e-6 * size  # rounding is no difference to spread over the whole height
    margin = (0.3 if log else 0.05 * size or 1.0) if level else 0.04 * (high - low)
    low, high = low - margin, high + margin
    return (10**low, 10**high) if log else (low, high)
