"""The report: one self-contained HTML file that works from disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchnorm.records import Run
from batchnorm.report.charts import build
from batchnorm.report.grid import Arm, Grid
from batchnorm.report.headline import summarize
from batchnorm.report.in_short import in_short
from batchnorm.report.spec import Chart, plain
from batchnorm.report.summary import Summary
from batchnorm.report.what_was_run import what_was_run
from batchnorm.report.words import join, number, plural

__all__ = ["render", "write_html"]

_POINTS = (400, 200, 100, 50)
"""Points a line: the first of these numbers that fits into the budget."""

_BUDGET = 2_000_000
"""Bytes for the numbers of all charts; script, styles and text come on top, below 3 MB in all."""


@dataclass(frozen=True)
class _Section:
    id: str
    short: str
    title: str
    intro: str
    charts: list[str]


_SECTIONS = [
    _Section(
        "training",
        "Training",
        "Training",
        "How the loss and the accuracy went, step by step.",
        ["loss", "accuracy"],
    ),
    _Section(
        "learning-rates",
        "Learning rate",
        "The learning rate",
        "Papers credit batch normalization with allowing larger learning rates.",
        ["learning-rate"],
    ),
    _Section(
        "activations",
        "Activations",
        "Inside the network: activations",
        "What the nonlinearities receive while the layers before them are learning.",
        ["percentiles", "moments", "histograms"],
    ),
    _Section(
        "gradients",
        "Gradients",
        "Inside the network: gradients",
        "How strongly each layer is told to change.",
        ["gradients"],
    ),
    _Section(
        "shift",
        "Covariate shift",
        "Internal covariate shift, measured",
        "[P1] names its reduction as the reason why batch normalization works; [P2] measures it "
        "and finds no reduction. Here is what this network does.",
        ["shift-distance", "shift-cosine"],
    ),
    _Section(
        "landscape",
        "Landscape",
        "The loss landscape along the gradient",
        "[P2] proposes instead that batch normalization makes the landscape smoother. At regular "
        "steps the network looks ahead along its gradient, without moving.",
        ["loss-variation", "predictiveness", "smoothness"],
    ),
    _Section(
        "statistics",
        "Statistics",
        "Running against batch statistics",
        "Training normalizes with the statistics of each batch, evaluation with running averages "
        "of them. Only networks with batch norm have both.",
        ["running-mean", "running-variance"],
    ),
    _Section(
        "weights",
        "Weights",
        "Weights and effective learning rate",
        "Normalization takes the scale of a weight out of what the network computes.",
        ["weight-norm", "effective-rate"],
    ),
]


def write_html(run: Run, path: Path) -> None:
    """Write the report of a run to ``path``; a reader sees the old file or the new one."""
    page = render(run)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def render(run: Run) -> str:
    """The report of a run as a page."""
    grid, summary = Grid(run), summarize(run)
    charts = build(grid, summary)
    title = _title(grid)
    # Nothing inside the script may end it.
    script = _resource("charts.js").replace("</script", "<\\/script")
    body = "".join(
        [
            _header(title, run, grid, summary),
            _toolbar(grid, summary, charts),
            "<main>",
            in_short(grid, summary),
            *(_section(section, charts, grid) for section in _SECTIONS),
            what_was_run(run, grid),
            "</main>",
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Whatever the records hold, the page asks nothing of the network.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_colors(grid.arms)}{_resource('report.css')}"
        f"</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{_data(grid, charts)}</script>\n'
        f"<script>{script}\n"
        'batchnorm.report(JSON.parse(document.getElementById("data").textContent));</script>\n'
        "</body>\n</html>\n"
    )


def _resource(name: str) -> str:
    return files("batchnorm.report").joinpath(name).read_text(encoding="utf-8")


def _data(grid: Grid, charts: Sequence[Chart]) -> str:
    """Everything that is drawn, with as many points as fit."""
    arms = [
        {"label": arm.label, "color": f"var(--arm-{i})", "dash": arm.dash}
        for i, arm in enumerate(grid.arms)
    ]
    text = ""
    for most, whole in (*((points, True) for points in _POINTS), (_POINTS[-1], False)):
        shown = [(chart if whole else chart.abridged()).thinned(most) for chart in charts]
        document = {"arms": arms, "rates": grid.rates, "charts": [_drawn(chart) for chart in shown]}
        text = json.dumps(document, separators=(",", ":"), allow_nan=False)
        if len(text) <= _BUDGET:
            break
    return text.replace("<", "\\u003c")


def _drawn(chart: Chart) -> dict[str, Any]:
    document: dict[str, Any] = plain(chart)
    del document["how"], document["source"]
    return document


def _colors(arms: Sequence[Arm]) -> str:
    def rule(color: Callable[[Arm], str]) -> str:
        pairs = (f"--arm-{i}:{color(arm)};" for i, arm in enumerate(arms))
        return f":root{{{''.join(pairs)}}}"

    dark = rule(lambda arm: arm.dark)
    light = rule(lambda arm: arm.light)
    return f"{light}@media screen and (prefers-color-scheme: dark){{{dark}}}\n"


def _title(grid: Grid) -> str:
    names = [arm.name for arm in grid.arms]
    if sorted(names) == ["batch", "none"]:
        return "Training with and without batch normalization"
    return f"Training {join([arm.phrase for arm in grid.arms])}"


def _header(title: str, run: Run, grid: Grid, summary: Summary) -> str:
    facts = [f"Study “{summary.study}”"]
    if run.cells:
        settings, task = run.cells[0].settings, run.cells[0].manifest["task"]
        facts = [
            f"{settings['model']} on {task['name']}",
            f"{task['train']:,} training and {task['test']:,} test examples",
            f"{settings['optimizer']}, batches of {task['batch_size']:,}",
            plural(int(settings["steps"]), "step"),
        ]
    facts += [
        plural(len(grid.rates), "learning rate"),
        plural(len(grid.seeds), "seed"),
    ]
    return (
        f'<header><p class="eyebrow">batchnorm {escape(summary.study)}</p>'
        f'<h1>{escape(title)}</h1><p class="facts">{escape(" · ".join(facts))}</p></header>'
    )


def _toolbar(grid: Grid, summary: Summary, charts: Sequence[Chart]) -> str:
    drawn = {chart.id for chart in charts}
    links = "".join(
        f'<a href="#{section.id}">{escape(section.short)}</a>'
        for section in _SECTIONS
        if drawn.intersection(section.charts)
    )
    options = "".join(
        f'<option value="{i}"{" selected" * (rate == summary.reference_rate)}>'
        f"{escape(number(rate, 6))}</option>"
        for i, rate in enumerate(grid.rates)
    )
    hidden = "" if len(grid.rates) > 1 else " hidden"
    return (
        f'<nav aria-label="Report"><div class="links">{links}<a href="#run">What was run</a></div>'
        f"<label{hidden}>Learning rate shown <select data-rate>{options}</select></label></nav>"
    )


def _section(section: _Section, charts: Sequence[Chart], grid: Grid) -> str:
    figures = "".join(_figure(chart) for chart in charts if chart.id in section.charts)
    if not figures:
        one_rate = section.id == "learning-rates" and len(grid.rates) == 1
        hint = "One learning rate was tried; this chart needs several." if one_rate else ""
        figures = f'<p class="nothing">{hint or "Not measured in this run."}</p>'
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>'
        f'<p class="intro">{escape(section.intro)}</p>'
        f'<div class="figures">{figures}</div></section>'
    )


def _figure(chart: Chart) -> str:
    size = "full" if chart.columns > 1 else "part"
    return (
        f'<figure id="chart-{chart.id}" class="{size}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p class="how">{escape(chart.how)} <cite>{escape(chart.source)}</cite></p></figcaption>'
        f'<div data-chart="{chart.id}"><noscript>This chart needs JavaScript.</noscript></div>'
        "</figure>"
    )
