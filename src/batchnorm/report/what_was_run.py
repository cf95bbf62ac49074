"""What closes the page: how to run it again, settings, data, versions, machine, time, papers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from batchnorm.records import Cell, Run
from batchnorm.report.figures import probe_seconds
from batchnorm.report.grid import Grid
from batchnorm.report.papers import REFERENCES
from batchnorm.report.words import number, percent

__all__ = ["what_was_run"]


def what_was_run(run: Run, grid: Grid | None, *, id: str = "run") -> str:
    """The section "What was run"; ``grid`` is the run's if it trained networks."""
    command = run.study.get("command", "")
    shown = command if isinstance(command, str) else shlex.join(command)
    parts = [
        f'<section id="{id}" aria-labelledby="{id}-title"><h2 id="{id}-title">What was run</h2>',
        f"<h3>To run it again</h3><pre tabindex='0'>{escape(shown)}</pre>" if shown else "",
        _changes(grid) if grid else "",
        '<div class="tables">',
        _table("Settings", _settings(run)),
        _table("Data", _over_cells(run.cells, "task")),
        _table("Versions", _over_cells(run.cells, "versions")),
        _table("Machine", _over_cells(run.cells, "machine")),
        _table("Networks", _networks(grid) if grid else {}),
        _table("Time", _times(run.cells)),
        "</div>",
        "<h3>Papers</h3><dl class='papers'>",
        *(f"<dt>[{key}]</dt><dd>{escape(text)}</dd>" for key, text in REFERENCES.items()),
        "</dl></section>",
    ]
    return "".join(parts)


def _changes(grid: Grid) -> str:
    parts = []
    for arm in grid.arms:
        cells = grid.of_arm(arm)
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


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_in_words(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(run: Run) -> dict[str, str]:
    """The study's settings; what was left to its default by being empty is left out."""
    return {
        key: _in_words(value)
        for key, value in run.study["settings"].items()
        if value is not None and value != {}
    }


def _over_cells(cells: Sequence[Cell], part: str) -> dict[str, str]:
    """One part of the manifests; where cells differ, all values."""
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        for key, value in cell.manifest.get(part, {}).items():
            if value not in (None, "", {}, []):
                values.setdefault(key, {})[_in_words(value)] = None
    return {key: "; ".join(several) for key, several in values.items()}


def _networks(grid: Grid) -> dict[str, str]:
    rows = {}
    for arm in grid.arms:
        cells = grid.of_arm(arm)
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
    rows = {"all runs": f"{number(total)} s", "training": _of_all_time(training, total)}
    if not probes:
        return {"all runs": rows["all runs"]}
    rows["all probes"] = _of_all_time(sum(probes.values()), total)
    rows |= {f"probe {name}": _of_all_time(seconds, total) for name, seconds in probes.items()}
    return rows


def _of_all_time(seconds: float, total: float) -> str:
    return f"{number(seconds)} s ({percent(seconds / total)})"
