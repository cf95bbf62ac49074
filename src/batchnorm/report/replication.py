"""The replication report: studies with their verdicts, each claim linked to its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from batchnorm.records import Run
from batchnorm.report.grid import Arm, Grid, arms_of
from batchnorm.report.shell import figure, shell
from batchnorm.report.spec import Chart
from batchnorm.report.what_was_run import what_was_run
from batchnorm.report.words import join, number, plural
from batchnorm.verdicts import Verdict

__all__ = ["Replication", "render_replications"]

_KINDS = {
    "holds": "yes",
    "holds weakly": "weak",
    "does not hold": "no",
    "cannot tell at this scale": "open",
}


@dataclass(frozen=True)
class Replication:
    """One study as the page shows it: what was asked, what was decided, what is drawn.

    ``lines`` names what ``Line.arm`` counts; left empty it is the norms of the run.
    """

    name: str
    question: str
    source: str
    run: Run
    verdicts: Sequence[Verdict]
    charts: Sequence[Chart]
    lines: Sequence[str] = ()

    @property
    def norms(self) -> list[str]:
        """The norms of the run, in order."""
        return list(dict.fromkeys(str(e["norm"]) for e in self.run.study["cells"] if "norm" in e))


def render_replications(parts: Sequence[Replication], *, command: str = "") -> str:
    """One self-contained page for one or several studies."""
    title = (
        f"Study {parts[0].name}: claims and what was measured"
        if len(parts) == 1
        else "Batch normalization: claims of two papers, replicated"
    )
    arms: list[Arm] = []
    charts: list[Chart] = []
    sections = []
    for part in parts:
        own = arms_of(part.lines or part.norms)
        drawn = [_for_page(part, chart, len(arms)) for chart in part.charts if chart.panels]
        arms += own
        charts += drawn
        sections.append(_section(part, drawn))
    links = "".join(f'<a href="#{part.name}">{escape(part.name)}</a>' for part in parts)
    again = f"<p class='facts'>To run it again: <code>{escape(command)}</code></p>"
    body = (
        f'<header><p class="eyebrow">batchnorm study</p><h1>{escape(title)}</h1>'
        f'<p class="facts">{escape(_facts(parts))}</p>{again if command else ""}</header>'
        f'<nav aria-label="Report"><div class="links"><a href="#verdicts">Verdicts</a>{links}'
        f"</div></nav><main>{_verdicts(parts)}{''.join(sections)}</main>"
    )
    return shell(title, body, arms, charts, [])


def _for_page(part: Replication, chart: Chart, offset: int) -> Chart:
    """The chart among those of other studies: its own id and arms, all learning rates at once."""
    rates = sorted({float(entry["lr"]) for entry in part.run.study["cells"] if "lr" in entry})
    several = len({panel.rate for panel in chart.panels} - {None}) > 1
    panels = []
    for panel in chart.panels:
        title = panel.title
        if several and panel.rate is not None:
            title = ", ".join(filter(None, (title, f"learning rate {number(rates[panel.rate])}")))
        lines = [replace(line, arm=line.arm + offset) for line in panel.lines]
        panels.append(replace(panel, lines=lines, title=title, rate=None))
    said = [
        f"Learning rate {number(rates[int(key)])}: {text}" if key and several else text
        for key, text in chart.findings.items()
    ]
    return replace(
        chart, id=f"{part.name}-{chart.id}", panels=panels, findings={"": " ".join(said)}
    )


def _facts(parts: Sequence[Replication]) -> str:
    decided = [verdict.verdict for part in parts for verdict in part.verdicts]
    counts = [f"{decided.count(kind)} {_counted(kind)}" for kind in _KINDS if kind in decided]
    scales = list(dict.fromkeys(str(part.run.study["scale"]) for part in parts))
    studies = f"{len(parts)} {'study' if len(parts) == 1 else 'studies'}"
    claims = f"{plural(len(decided), 'claim')}: {', '.join(counts)}"
    return f"scale {join(scales)} · {studies} · {claims}"


def _counted(kind: str) -> str:
    """``2 hold``, ``1 cannot be told at this scale``."""
    return {
        "holds": "held",
        "holds weakly": "held weakly",
        "does not hold": "did not hold",
        "cannot tell at this scale": "could not be told at this scale",
    }[kind]


def _verdicts(parts: Sequence[Replication]) -> str:
    """The verdict table, every study a group of rows."""
    heads = ("claim", "the paper reports", "measured here", "verdict", "note")
    header = "".join(f'<th scope="col">{head}</th>' for head in heads)
    groups = []
    for part in parts:
        rows = "".join(_row(part, verdict) for verdict in part.verdicts)
        group = (
            f'<tr><th scope="rowgroup" colspan="{len(heads)}">'
            f'<a href="#{part.name}">{escape(part.name)}</a></th></tr>'
            if len(parts) > 1
            else ""
        )
        groups.append(f"<tbody>{group}{rows}</tbody>")
    return (
        '<section id="verdicts" aria-labelledby="verdicts-title">'
        '<h2 id="verdicts-title">Verdicts</h2>'
        '<p class="intro" id="verdicts-rule">'
        "Measured: mean over the seeds with its 95% confidence interval. A claim holds "
        "where the whole interval lies beyond what the paper's words demand, weakly where it lies "
        "beyond no effect, does not hold where it lies on the other side of no effect, and cannot "
        "be told otherwise. Identities hold where every seed is within rounding.</p>"
        '<div class="wide" tabindex="0" role="region" aria-label="Verdicts">'
        '<table class="verdicts" aria-labelledby="verdicts-title" '
        'aria-describedby="verdicts-rule">'
        f"<thead><tr>{header}</tr></thead>{''.join(groups)}</table></div></section>"
    )


def _row(part: Replication, verdict: Verdict) -> str:
    drawn = {chart.id: chart.title for chart in part.charts if chart.panels}
    links = "".join(
        f'<small><a href="#chart-{part.name}-{name}">Figure: {escape(drawn[name])}</a></small>'
        for name in verdict.figures
        if name in drawn
    )
    kind = _KINDS[verdict.verdict]
    return (
        f'<tr id="claim-{part.name}-{escape(verdict.claim)}"><th scope="row">'
        f"{escape(verdict.sentence)}<small>{escape(verdict.source)}</small>{links}</th>"
        f"<td>{escape(verdict.reported)}</td>"
        f"<td>{escape(verdict.measured)}<small>{escape(verdict.effect)}</small></td>"
        f'<td><strong class="verdict {kind}">{escape(verdict.verdict)}</strong></td>'
        f"<td>{escape(verdict.note)}</td></tr>"
    )


def _section(part: Replication, charts: Sequence[Chart]) -> str:
    figures = "".join(figure(chart) for chart in charts)
    nothing = '<p class="nothing">Nothing has been measured yet.</p>'
    trained = any("task" in cell.manifest for cell in part.run.cells)
    run = what_was_run(part.run, Grid(part.run) if trained else None, id=f"{part.name}-run")
    return (
        f'<section id="{part.name}" aria-labelledby="{part.name}-title">'
        f'<h2 id="{part.name}-title">{escape(part.name)}</h2>'
        f'<p class="intro">{escape(part.question)} <cite>{escape(part.source)}</cite></p>'
        f'<div class="figures">{figures or nothing}</div>'
        f"<details><summary>What was run</summary>{run}</details></section>"
    )
