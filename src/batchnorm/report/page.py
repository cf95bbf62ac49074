"""The report: one self-contained HTML file that works from disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from batchnorm.records import Run
from batchnorm.report.charts import build
from batchnorm.report.grid import Grid
from batchnorm.report.headline import summarize
from batchnorm.report.in_short import in_short
from batchnorm.report.shell import figure, shell, write_page
from batchnorm.report.spec import Chart
from batchnorm.report.summary import Summary
from batchnorm.report.what_was_run import what_was_run
from batchnorm.report.words import join, number, plural

__all__ = ["render", "write_html"]


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
    write_page(render(run), path)


def render(run: Run) -> str:
    """The report of a run as a page."""
    grid, summary = Grid(run), summarize(run)
    charts = build(grid, summary)
    title = _title(grid)
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
    return shell(title, body, grid.arms, charts, grid.rates)


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
    figures = "".join(figure(chart) for chart in charts if chart.id in section.charts)
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
