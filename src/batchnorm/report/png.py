"""The charts of the report as pictures, drawn by matplotlib."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.extras import require
from batchnorm.records import Run
from batchnorm.report.charts import build
from batchnorm.report.grid import Arm, Grid, Vector, arms_of
from batchnorm.report.headline import summarize
from batchnorm.report.replication import Replication
from batchnorm.report.spec import Axis, Chart, Line, Panel
from batchnorm.report.words import number

__all__ = ["write_charts", "write_png"]

_WIDTH, _HEIGHT = 4.6, 3.0  # inches of one panel
_COLUMNS = 4
_SAMPLE, _LETTER, _ROW = 0.7, 0.08, 0.21  # inches of the legend: a sample, a letter, a row


def write_png(run: Run, folder: Path) -> list[Path]:
    """Draw each chart of the report into ``folder``, at the learning rate that the report opens at.

    Returns:
        The files written, named after the charts.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="plot", purpose="Drawing PNG files")
    grid, summary = Grid(run), summarize(run)
    folder.mkdir(parents=True, exist_ok=True)
    rate = grid.rates.index(summary.reference_rate) if summary.reference_rate is not None else 0
    written = []
    for chart in build(grid, summary):
        if panels := chart.shown(rate):
            path = folder / f"{chart.id}.png"
            title = chart.title
            if panels[0].rate is not None and len(grid.rates) > 1:
                title += f" (learning rate {number(grid.rates[rate])})"
            _figure(figures, chart, title, panels, grid.arms).savefig(path, dpi=150)
            written.append(path)
    return written


def write_charts(part: Replication, folder: Path) -> list[Path]:
    """Draw each chart of a study into ``folder``.

    Returns:
        The files written, named after the charts.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="plot", purpose="Drawing PNG files")
    folder.mkdir(parents=True, exist_ok=True)
    arms = arms_of(part.lines or part.norms)
    written = []
    for chart in part.charts:
        if panels := [
            panel
            for panel in chart.panels
            if chart.overview is None or panel.layer in (None, *chart.overview)
        ]:
            path = folder / f"{chart.id}.png"
            _figure(figures, chart, chart.title, panels, arms).savefig(path, dpi=150)
            written.append(path)
    return written


def _figure(figures: Any, chart: Chart, title: str, panels: list[Panel], arms: list[Arm]) -> Any:
    columns = min(chart.columns, len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width = max(_WIDTH * columns, 1.3 * _WIDTH)
    shown = sorted({line.arm for panel in panels for line in panel.lines})
    widest = max(len(arms[i].label) for i in shown)
    fitting = max(1, int(width / (_SAMPLE + _LETTER * widest)))
    legend_rows = math.ceil(len(shown) / fitting)
    size = (width, _HEIGHT * rows + 0.9 + _ROW * (legend_rows - 1))
    figure = figures.Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, chart, panel, arms)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    handles = [
        axes.plot([], [], color=arms[i].light, linestyle=_dash(arms[i]), label=arms[i].label)[0]
        for i in shown
    ]
    note = f"band: {chart.band}" if chart.band else None
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), fitting),
        title=note,
        frameon=False,
    )
    legend.get_title().set_fontsize("small")
    return figure


def _dash(arm: Arm) -> Any:
    return (0, tuple(float(part) / 2 for part in arm.dash.split())) if arm.dash else "solid"


def _draw(axes: Any, chart: Chart, panel: Panel, arms: list[Arm]) -> None:
    for line in panel.lines:
        _line(axes, chart, panel, line, arms[line.arm])
    for rule in panel.rules:
        axes.axhline(rule.y, color="#666666", linestyle=":", linewidth=1)
        label = axes.annotate(
            rule.label,
            (0.99, rule.y),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#555555",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            zorder=4,
            annotation_clip=True,
        )
        label.set_in_layout(False)
    _axis(axes.xaxis, axes.set_xscale, chart.x)
    _axis(axes.yaxis, axes.set_yscale, chart.y)
    if chart.x.domain:
        axes.set_xlim(chart.x.domain)
    if panel.domain:
        axes.set_ylim(panel.domain)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Any, chart: Chart, panel: Panel, line: Line, arm: Arm) -> None:
    style = {"color": arm.light, "linestyle": _dash(arm)}
    step = chart.shape == "step"
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=arm.light, alpha=0.18, linewidth=0)
        if line.y is None:
            for edge in (line.low, line.high):
                axes.plot(line.x, edge, linewidth=1.2, **style)
    if line.y is not None:
        marker = "o" if chart.dots else ""
        draw = "steps-post" if step else "default"
        axes.plot(line.x, line.y, marker=marker, markersize=4, drawstyle=draw, **style)
        alone = _alone(line.y)
        axes.plot(
            line.x[alone], line.y[alone], marker="o", markersize=4, linestyle="", color=arm.light
        )
        if step:
            axes.fill_between(line.x, 0, line.y, step="post", color=arm.light, alpha=0.15)
    low, high = panel.domain or (-math.inf, math.inf)
    for end in line.ends:
        y = min(max(end.y, low), high)
        axes.plot([end.x], [y], marker="x", markersize=8, mew=2.2, color=arm.light, clip_on=False)


def _alone(y: Vector) -> NDArray[np.bool_]:
    """Points without a neighbour, which a line would not show."""
    there = np.isfinite(y)
    padded = np.concatenate([[False], there, [False]])
    alone: NDArray[np.bool_] = there & ~padded[:-2] & ~padded[2:]
    return alone


def _axis(axis: Any, set_scale: Any, spec: Axis) -> None:
    set_scale(spec.type)
    axis.set_label_text(spec.label)
    if spec.names:
        places = range(1, len(spec.names) + 1)
        short = sum(len(name) + 2 for name in spec.names) < 40
        axis.set_ticks(list(places), spec.names if short else [str(place) for place in places])
    elif spec.ticks:
        axis.set_ticks(spec.ticks, [number(tick) for tick in spec.ticks], minor=False)
        axis.set_ticks([], minor=True)
    elif spec.percent:
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
