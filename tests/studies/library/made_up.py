"""Cells made up for the measures of studies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.records import Cell, Record, Run


def cell(
    norm: str,
    series: Mapping[str, Mapping[int, float]],
    *,
    seed: int = 0,
    layers: tuple[str, ...] = (),
    **settings: Any,
) -> Cell:
    """A cell that ended. ``series`` is by quantity, or by ``layer:quantity``."""
    records = []
    for name, values in series.items():
        layer, _, quantity = name.rpartition(":")
        records += [Record(step, layer, quantity, value) for step, value in values.items()]
    steps = max((step for values in series.values() for step in values), default=0)
    manifest = {
        "settings": {"norm": norm, "lr": 0.1, "seed": seed, "model": "cnn", "steps": steps}
        | settings,
        "state": "done",
        "step": steps,
        "layers": list(layers),
        "task": {"outputs": 10, "kind": "classification", "test": 10},
    }
    return Cell(Path(norm), manifest, tuple(records))


def run(*cells: Cell, scale: str = "full") -> Run:
    """A run of these cells."""
    names = ("norm", "lr", "seed", "model")
    planned = [{name: c.settings[name] for name in names} for c in cells]
    return Run(Path(), {"study": "made up", "scale": scale, "cells": planned}, tuple(cells))
