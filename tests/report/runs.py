"""Run folders made by hand, so that every figure of a report can be checked on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchnorm.records import FORMAT, Record, RecordWriter, Run, cell_hash, write_json
from batchnorm.report import Summary, summarize
from batchnorm.report.charts import build
from batchnorm.report.grid import Grid
from batchnorm.report.spec import Chart


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
            "test_limit": 1000,
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
        kind: str = "classification",
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
                    "kind": kind,
                    "train": 1437,
                    "test": 360,
                    "shape": [64],
                    "outputs": 10,
                    "batch_size": 60,
                    "constant_loss": 2.3,
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


def embedded(page: str) -> dict[str, Any]:
    """The chart specifications inside a page."""
    start = page.index('id="data">') + len('id="data">')
    document: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return document


def charts_of(builder: Builder) -> dict[str, Chart]:
    """The charts of a run, by their ids."""
    run = builder.run()
    return {chart.id: chart for chart in build(Grid(run), summarize(run))}


LAYERS = ("fc1", "fc2", "out")


def measured(
    norm: str,
    *,
    steps: int = 100,
    every: int = 10,
    layers: Sequence[str] = LAYERS,
    stop: int | None = None,
    accuracy: bool = True,
    offset: float = 0.0,
) -> list[Record]:
    """Records of every quantity; with ``stop``, the loss is NaN there and nothing follows."""
    last = steps if stop is None else stop
    quick = 0.02 if norm == "none" else 0.08
    records = []
    for step in range(0, last + 1, every):
        left = math.exp(-quick * step)
        whole = {"batch/loss": 2.3 * left + 0.01, "train/loss": 2.3 * left + 0.01}
        whole["test/loss"] = 2.3 * left + 0.1
        if accuracy:
            whole |= {"train/accuracy": 1 - 0.9 * left, "test/accuracy": 0.98 - 0.88 * left}
        whole |= {"landscape/loss_low": 2 * left + 0.01, "landscape/loss_high": 3 * left + 0.02}
        whole |= {"landscape/gradient_low": 0.1, "landscape/gradient_high": 0.1 + left}
        whole["landscape/smoothness"] = 2.0 + left
        records += [Record(step, "", name, value + offset) for name, value in whole.items()]
        for depth, layer in enumerate(layers):
            each = {"mean": 0.1, "std": 1.0, "p15": -1.0, "p50": 0.1, "p85": 1.2}
            each |= {"low": -3.0, "high": 3.0}
            each = {f"activation/{name}": value for name, value in each.items()}
            each["gradient/norm"] = 10.0 ** (depth - len(layers)) * (1 + left)
            each |= {"shift/l2": 0.3 * depth * left, "shift/cosine": 1 - 0.2 * depth}
            each |= {"weight/norm": 5.0 + step / 100, "weight/effective_lr": 0.01}
            if norm == "batch" and layer != layers[-1]:
                each |= {"running/mean_error": 0.1 + left, "running/log_variance_ratio": left}
            records += [Record(step, layer, name, value) for name, value in each.items()]
            bins = [math.exp(-(((i - 15.5) / 6) ** 2)) for i in range(32)]
            records += [
                Record(step, layer, "activation/histogram", value / sum(bins), i)
                for i, value in enumerate(bins)
            ]
    if stop is not None:
        records.append(Record(stop, "", "batch/loss", math.nan))
    return records


STEPS = (0, 10, 20, 30)


def accuracies(*values: float) -> list[Record]:
    """The test accuracy at each of ``STEPS``."""
    return series("test/accuracy", dict(zip(STEPS, values, strict=True)))


def losses(first: float, last: float) -> list[Record]:
    """The training loss at the first and the last of ``STEPS``."""
    return series("train/loss", {0: first, 30: last})


def race_of_three_seeds(builder: Builder) -> Summary:
    """Two arms that do not reach each other's best with every seed."""
    none = [(0.1, 0.5, 0.6, 0.7), (0.1, 0.4, 0.8, 0.6), (0.1, 0.2, 0.3, 0.9)]
    batch = [(0.1, 0.7, 0.8, 0.8), (0.1, 0.6, 0.75, 0.85), (0.1, 0.3, 0.5, 0.8)]
    for seed in range(3):
        builder.cell("none", 0.1, seed, accuracies(*none[seed]) + losses(2.3, 1.0))
        builder.cell("batch", 0.1, seed, accuracies(*batch[seed]) + losses(2.3, 0.5))
    return summarize(builder.run())
