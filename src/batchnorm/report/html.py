"""The report: one self-contained HTML file that works from disk."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchnorm.records import Cell, Run
from batchnorm.report.charts import build
from batchnorm.report.grid import Arm, Grid
from batchnorm.report.headline import Outcome, Spread, Summary, probe_seconds, summarize
from batchnorm.report.spec import Chart, plain
from batchnorm.report.words import count, join, number, percent, plural, seeds_of, span

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

_PAPERS = [
    (
        "P1",
        "Sergey Ioffe and Christian Szegedy: Batch Normalization: Accelerating Deep Network "
        "Training by Reducing Internal Covariate Shift. 2015. arXiv 1502.03167.",
    ),
    (
        "P2",
        "Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas and Aleksander Mądry: How Does Batch "
        "Normalization Help Optimization? 2018. arXiv 1805.11604.",
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
            _headline(grid, summary),
            *(_section(section, charts, grid) for section in _SECTIONS),
            _about(run, grid),
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
    if len(names) == 1:
        return f"Training {grid.arms[0].phrase}"
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


def _headline(grid: Grid, summary: Summary) -> str:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary.sentences)
    if not any(outcome.ended for outcome in summary.outcomes):
        sentences += "<li>No training run has ended yet, so there are no final figures.</li>"
    cards = "".join(_cards(grid, summary))
    return (
        '<section id="headline" aria-labelledby="headline-title">'
        '<h2 id="headline-title">In short</h2>'
        f'<div class="cards">{cards}</div><ul class="findings">{sentences}</ul>'
        f"{_outcomes(grid, summary)}</section>"
    )


def _card(title: str, rows: Iterable[tuple[int, Arm, str, str]]) -> str:
    items = "".join(
        f'<li><span class="swatch" style="--arm:var(--arm-{i})"></span>'
        f'<span class="who">{escape(arm.label)}</span><strong>{escape(figure)}</strong>'
        f"<small>{escape(note)}</small></li>"
        for i, arm, figure, note in rows
    )
    return f'<div class="card"><h3>{escape(title)}</h3><ul>{items}</ul></div>' if items else ""


def _over_seeds(spread: Spread, show: Callable[[float], str]) -> str:
    if len(spread.seeds) == 1:
        return "one seed"
    low, high = show(spread.low), show(spread.high)
    if low == high:
        return seeds_of(len(spread.seeds), len(spread.seeds))
    return f"{low} to {high} over {len(spread.seeds)} seeds"


def _to_target(summary: Summary, arm: Arm, rate: float) -> tuple[str, str] | None:
    """Steps to the reference's best: a figure and how it varies."""
    reference = summary.reference or ""
    if arm.name == reference:
        own = summary.outcome(arm.name, rate).steps_to_best
        return (count(own.median), _over_seeds(own, count)) if own else None
    race = summary.race(arm.name, reference, rate)
    if race is None:
        return None
    spread = Spread.of({seed: float(step) for seed, step in race.steps.items()})
    missed = f"not reached with {plural(len(race.missed), 'seed')}" if race.missed else ""
    if race.median is None or spread is None:
        return "not reached", missed
    return count(race.median), missed or _over_seeds(spread, count)


def _cards(grid: Grid, summary: Summary) -> Iterable[str]:
    rate = summary.reference_rate
    if rate is None:
        return
    reference = next(arm for arm in grid.arms if arm.name == summary.reference)
    best = summary.outcome(reference.name, rate).best
    arms = list(enumerate(grid.arms))
    if best and len(arms) > 1:
        yield _card(
            f"Steps to the best {summary.measure} {reference.phrase} "
            f"({summary.show(best.mean)}, learning rate {number(rate)})",
            ((i, arm, *figure) for i, arm in arms if (figure := _to_target(summary, arm, rate))),
        )
    finals = []
    for i, arm in arms:
        own = summary.best_rate[arm.name]
        final = summary.outcome(arm.name, own).final if own is not None else None
        if own is not None and final:
            where = f", learning rate {number(own)}" if len(grid.rates) > 1 else ""
            note = _over_seeds(final, summary.show) + where
            finals.append((i, arm, summary.show(final.mean), note))
    each = ", each at its own best learning rate" if len(grid.rates) > 1 else ""
    yield _card(f"Final {summary.measure}{each}", finals)
    if len(grid.rates) > 1 and any(one.ended for one in summary.outcomes):
        rates = join([number(rate) for rate in grid.rates])

        def judged(arm: Arm) -> str:
            top = summary.largest_stable[arm.name]
            lost = top is not None and summary.outcome(arm.name, top).guessing
            return f"{'no better than guessing there; ' if lost else ''}of {rates} tried"

        yield _card(
            "Largest stable learning rate",
            ((i, arm, summary.shown_stable(arm.name), judged(arm)) for i, arm in arms),
        )


def _outcomes(grid: Grid, summary: Summary) -> str:
    if not any(one.ended for one in summary.outcomes):
        return ""
    reference = next(arm for arm in grid.arms if arm.name == summary.reference)
    rows = []
    for rate in grid.rates:
        for i, arm in enumerate(grid.arms):
            one = summary.outcome(arm.name, rate)
            target = _to_target(summary, arm, rate)
            cells = [
                f"{target[0]}|{target[1]}" if target else "–",
                _figure(one.final, summary),
                _figure(one.best, summary),
                {True: "yes", False: "no", None: "not finished"}[one.stable]
                + ("|no better than guessing" if one.guessing else ""),
                _diverged(one),
            ]
            first = f'<th scope="rowgroup" rowspan="{len(grid.arms)}">{number(rate)}</th>'
            rows.append(
                f"<tr>{first if i == 0 else ''}<th scope='row'><span class='swatch' "
                f"style='--arm:var(--arm-{i})'></span>{escape(arm.label)}</th>"
                f"{''.join(_cell(cell) for cell in cells)}</tr>"
            )
    every = summary.measured_every
    stride = f" (measured every {plural(every, 'step')})" if every else ""
    heads = [
        "learning rate",
        "network",
        f"steps to the best {summary.measure} {reference.phrase}",
        f"final {summary.measure}",
        f"best {summary.measure}",
        "stable",
        "diverged",
    ]
    header = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="All figures">'
        f"<table><caption>All learning rates. Steps: median and range over the seeds{stride}; "
        "final and best: mean and range. Stable: every seed ended with a training loss below "
        f"that of the best answer that ignores the input.</caption><thead><tr>{header}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    figure, _, note = text.partition("|")
    return f"<td>{escape(figure)}{f'<small>{escape(note)}</small>' if note else ''}</td>"


def _figure(spread: Spread | None, summary: Summary) -> str:
    return f"{summary.show(spread.mean)}|{_over_seeds(spread, summary.show)}" if spread else "–"


def _diverged(one: Outcome) -> str:
    if not one.diverged:
        return "no" if one.ended else "–"
    steps = sorted(one.diverged.values())
    return f"{len(one.diverged)} of {one.planned}|step {span(count(steps[0]), count(steps[-1]))}"


def _section(section: _Section, charts: Sequence[Chart], grid: Grid) -> str:
    figures = "".join(_chart_figure(chart) for chart in charts if chart.id in section.charts)
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


def _chart_figure(chart: Chart) -> str:
    size = "full" if chart.columns > 1 else "part"
    return (
        f'<figure id="chart-{chart.id}" class="{size}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p class="how">{escape(chart.how)} <cite>{escape(chart.source)}</cite></p></figcaption>'
        f'<div data-chart="{chart.id}"><noscript>This chart needs JavaScript.</noscript></div>'
        "</figure>"
    )


def _about(run: Run, grid: Grid) -> str:
    command = run.study.get("command", "")
    text = command if isinstance(command, str) else shlex.join(command)
    parts = [
        '<section id="run" aria-labelledby="run-title"><h2 id="run-title">What was run</h2>',
        f"<h3>To run it again</h3><pre tabindex='0'>{escape(text)}</pre>" if text else "",
        _changes(grid),
        '<div class="tables">',
        _table("Settings", _settings(run)),
        _table("Data", _common(run.cells, "task")),
        _table("Versions", _common(run.cells, "versions")),
        _table("Machine", _common(run.cells, "machine")),
        _table("Networks", _networks(grid)),
        _table("Time", _times(run.cells)),
        "</div>",
        "<h3>Papers</h3><dl class='papers'>",
        *(f"<dt>[{key}]</dt><dd>{escape(text)}</dd>" for key, text in _PAPERS),
        "</dl></section>",
    ]
    return "".join(parts)


def _changes(grid: Grid) -> str:
    parts = []
    for arm in grid.arms:
        cells = [cell for rate in grid.rates for cell in grid.at(arm, rate)]
        changes = dict.fromkeys(change for cell in cells for change in cell.manifest["changes"])
        if changes:
            items = "".join(f"<li>{escape(str(change))}</li>" for change in changes)
            title = escape(f"Changed in the network to train it {arm.phrase}")
            parts.append(f"<h3>{title}</h3><ul>{items}</ul>")
    return "".join(parts)


def _table(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(key.replace("_", " "))}</th><td>{escape(value)}</td></tr>'
        for key, value in rows.items()
    )
    return f"<table><caption>{escape(title)}</caption><tbody>{body}</tbody></table>"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(run: Run) -> dict[str, str]:
    """The study's settings; what was left to its default by being empty is left out."""
    return {
        key: _shown(value)
        for key, value in run.study["settings"].items()
        if value is not None and value != {}
    }


def _common(cells: Sequence[Cell], part: str) -> dict[str, str]:
    """One part of the manifests; where cells differ, all values."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        for key, value in cell.manifest[part].items():
            if value not in (None, "", {}, []):
                values.setdefault(key, {})[_shown(value)] = None
    return {key: "; ".join(several) for key, several in values.items()}


def _networks(grid: Grid) -> dict[str, str]:
    rows = {}
    for arm in grid.arms:
        cells = [cell for rate in grid.rates for cell in grid.at(arm, rate)]
        sizes = dict.fromkeys(f"{cell.manifest['parameters']:,} parameters" for cell in cells)
        if sizes:
            rows[arm.label] = "; ".join(sizes)
    if grid.layers:
        rows["layers, first to last"] = ", ".join(grid.layers)
    return rows


def _times(cells: Sequence[Cell]) -> dict[str, str]:
    total = sum(float(cell.manifest["timing"].get("total", 0)) for cell in cells)
    if not total:
        return {}
    training = sum(float(cell.manifest["timing"].get("train", 0)) for cell in cells)
    probes: dict[str, float] = {}
    for cell in cells:
        for name, seconds in probe_seconds(cell).items():
            probes[name] = probes.get(name, 0.0) + seconds
    rows = {"all training runs": f"{number(total)} s", "training": _part(training, total)}
    rows["all probes"] = _part(sum(probes.values()), total)
    rows |= {f"probe {name}": _part(seconds, total) for name, seconds in probes.items()}
    return rows


def _part(seconds: float, total: float) -> str:
    return f"{number(seconds)} s ({percent(seconds / total)})"
