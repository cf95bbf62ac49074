"""Run folders made by hand, so that every figure of a report can be checked on paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from batchnorm.records import FORMAT, Record, RecordWriter, Run, cell_hash, write_json

Measure = Callable[[str, float, int], Iterable[Record]]


def series(quantity: str, values: Mapping[int, float], layer: str = "") -> list[Record]:
    return [Record(step, layer, quantity, value) for step, value in values.items()]


class Builder:
    """Collects cells and writes them as a run folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = {
            "task": "digits",
            "model": "mlp",
            "optimizer": "sgd",
            "steps": 100,
            "batch_size": None,
            "code": {},
            **settings,
        }
        self.cells: list[dict[str, Any]] = []

    def cell(
        self,
        norm: str,
        lr: float,
        seed: int,
        records: Sequence[Record] | None,
        *,
        state: str = "done",
        step: int | None = None,
        layers: Sequence[str] = ("fc1", "fc2", "out"),
        changes: Sequence[str] = (),
        timing: Mapping[str, float] | None = None,
    ) -> None:
        """Add a cell; with ``records=None`` one that has not started."""
        axes = {"norm": norm, "lr": lr, "seed": seed}
        name = cell_hash({**self.settings, **axes})
        self.cells.append({"cell": name, **axes})
        if records is None:
            return
        folder = self.folder / "cells" / name
        folder.mkdir(parents=True)
        with RecordWriter(folder / "records.jsonl") as writer:
            writer.write(records)
        write_json(
            folder / "manifest.json",
            {
                "format": FORMAT,
                "cell": name,
                "settings": {**self.settings, **axes},
                "state": state,
                "step": self.settings["steps"] if step is None else step,
                "layers": list(layers),
                "unit": 0,
                "parameters": 1234,
                "changes": list(changes),
                "task": {
                    "name": self.settings["task"],
                    "kind": "classification",
                    "train": 1437,
                    "test": 360,
                    "shape": [64],
                    "outputs": 10,
                    "batch_size": 60,
                    "note": "",
                },
                "versions": {"batchnorm": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
                "machine": {"system": "Linux", "processor": "x86_64", "cpus": 2, "threads": 1},
                "timing": dict(timing or {"train": 3.0, "gradients": 1.0, "total": 4.0}),
            },
        )

    def run(self) -> Run:
        """Write ``study.json`` and read the folder back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        norms, rates = ({c[key]: None for c in self.cells} for key in ("norm", "lr"))
        settings = {**self.settings, "norm": list(norms), "lr": list(rates), "seeds": 3}
        del settings["code"]
        write_json(
            self.folder / "study.json",
            {
                "format": FORMAT,
                "study": "compare",
                "settings": settings,
                "command": "batchnorm compare --out runs/demo",
                "cells": self.cells,
            },
        )
        return Run.read(self.folder)


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "run")


def embedded(page: str) -> dict[str, Any]:
    """The chart specifications inside a page."""
    start = page.index('id="data">') + len('id="data">')
    document: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return document
