"""What every page is made of: one HTML file with its styles, its script and its numbers inside."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from batchnorm.report.grid import Arm
from batchnorm.report.spec import Chart, plain

__all__ = ["figure", "shell", "write_page"]

_POINTS = (400, 200, 100, 50)
"""Points a line: the first of these numbers that fits into the budget."""

_BUDGET = 2_000_000
"""Bytes for the numbers of all charts; script, styles and text come on top, below 3 MB in all."""


def write_page(page: str, path: Path) -> None:
    """Write a page to ``path``; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def shell(
    title: str, body: str, arms: Sequence[Arm], charts: Sequence[Chart], rates: Sequence[float]
) -> str:
    """A whole page around ``body``, with the charts that its figures name."""
    # Nothing inside the script may end it.
    script = _resource("charts.js").replace("</script", "<\\/script")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Whatever the records hold, the page asks nothing of the network.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_colors(arms)}{_resource('report.css')}"
        f"</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{_data(arms, charts, rates)}</script>\n'
        f"<script>{script}\n"
        'batchnorm.report(JSON.parse(document.getElementById("data").textContent));</script>\n'
        "</body>\n</html>\n"
    )


def figure(chart: Chart) -> str:
    """The place of a chart on the page, with its title and how to read it."""
    size = "full" if chart.columns > 1 else "part"
    return (
        f'<figure id="chart-{chart.id}" class="{size}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p class="how">{escape(chart.how)} <cite>{escape(chart.source)}</cite></p></figcaption>'
        f'<div data-chart="{chart.id}"><noscript>This chart needs JavaScript.</noscript></div>'
        "</figure>"
    )


def _resource(name: str) -> str:
    return files("batchnorm.report").joinpath(name).read_text(encoding="utf-8")


def _data(arms: Sequence[Arm], charts: Sequence[Chart], rates: Sequence[float]) -> str:
    """Everything that is drawn, with as many points as fit."""
    styles = [
        {"label": arm.label, "color": f"var(--arm-{i})", "dash": arm.dash}
        for i, arm in enumerate(arms)
    ]
    text = ""
    for most, whole in (*((points, True) for points in _POINTS), (_POINTS[-1], False)):
        shown = [(chart if whole else chart.abridged()).thinned(most) for chart in charts]
        document = {
            "arms": styles,
            "rates": list(rates),
            "charts": [_drawn(chart) for chart in shown],
        }
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
