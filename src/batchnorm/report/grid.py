"""A run seen as a grid: arms by learning rates, with the seeds of each place as one series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.records import Cell, Run

__all__ = ["Arm", "Grid", "Series", "Vector", "across", "arms_of", "finite", "measured_layers"]

Vector = NDArray[np.float64]

# Colours that remain distinct to colour-blind readers, for light and for dark paper, and a dash
# pattern for those who print in grey. The usual arms keep theirs in every report.
_STYLES = [
    ("#c2410c", "#ff9d66", "6 3"),
    ("#0060a8", "#6cb8ff", ""),
    ("#00795a", "#4fd0a8", "2 3"),
    ("#9c3f86", "#ee9bdc", "9 3 2 3"),
    ("#7a5c00", "#e3c04c", "12 4"),
    ("#4a4a8f", "#a9a9f5", "4 2 1 2"),
    ("#5b5b5b", "#bdbdbd", "1 2"),
    ("#a3123f", "#ff8fa8", "7 2 2 2 2 2"),
]
_OWN = {"none": 0, "batch": 1, "layer": 2, "group": 3}
_LABELS = {
    "none": "no normalization",
    "batch": "batch norm",
    "layer": "layer norm",
    "group": "group norm",
    "weight": "weight standardization",
    "l1": "ℓ1 normalization",
    "l2": "ℓ2 normalization",
    "linf": "ℓ∞ normalization",
    "noisy": "noisy batch norm",
    "noise": "noise without batch norm",
    **{f"ghost{size}": f"ghost batch norm of {size}" for size in (2, 4, 8, 16, 32)},
    "renorm": "batch renormalization",
    "frozen": "frozen batch norm",
}
_PHRASES = {"none": "without normalization", "noise": "with noise and without batch norm"}


@dataclass(frozen=True)
class Arm:
    """One normalization: how it is called and how it is drawn."""

    name: str
    label: str
    phrase: str
    light: str
    dark: str
    dash: str

    @property
    def network(self) -> str:
        """The arm as the subject of a sentence."""
        return f"the network {self.phrase}"


@dataclass(frozen=True)
class Series:
    """A quantity by step: its mean over the seeds, its smallest and its largest value."""

    x: Vector
    y: Vector
    low: Vector
    high: Vector


def finite(values: Vector) -> Vector:
    """The values that are neither NaN nor infinite."""
    return values[np.isfinite(values)]


def across(seeds: Sequence[Mapping[int, float]]) -> Series | None:
    """One series over several seeds.

    Values that are not finite are left out: a step at which no seed has a finite value is NaN.
    """
    steps = sorted(set().union(*seeds))
    if not steps:
        return None
    table = np.array([[values.get(step, math.nan) for step in steps] for values in seeds])
    table[~np.isfinite(table)] = np.nan
    there = ~np.isnan(table).all(axis=0)
    y, low, high = (np.full(len(steps), np.nan) for _ in range(3))
    y[there] = np.nanmean(table[:, there], axis=0)
    low[there] = np.nanmin(table[:, there], axis=0)
    high[there] = np.nanmax(table[:, there], axis=0)
    return Series(np.array(steps, dtype=float), y, low, high)


def arms_of(names: Sequence[str]) -> list[Arm]:
    """How each arm is called and drawn; the usual ones are drawn the same everywhere."""
    taken = {_OWN[name] for name in names if name in _OWN}
    free = [slot for slot in range(len(_STYLES)) if slot not in taken]
    arms: list[Arm] = []
    for name in names:
        others = sum(arm.name not in _OWN for arm in arms)
        default = free[others % len(free)] if free else others % len(_STYLES)
        label, slot = _LABELS.get(name, name), _OWN.get(name, default)
        phrase = _PHRASES.get(name, f"with {label}")
        arms.append(Arm(name, label, phrase, *_STYLES[slot]))
    return arms


class Grid:
    """The cells of a run that train networks, by arm, learning rate and seed."""

    def __init__(self, run: Run) -> None:
        """Sort the cells of ``run``; those that have not started are only counted."""
        planned = [entry for entry in run.study["cells"] if {"norm", "lr"} <= entry.keys()]
        self.study = str(run.study["study"])
        self.cells = tuple(cell for cell in run.cells if "task" in cell.manifest)
        self.arms = arms_of(list(dict.fromkeys(str(entry["norm"]) for entry in planned)))
        self.rates = sorted({float(entry["lr"]) for entry in planned})
        self.seeds = sorted({int(entry["seed"]) for entry in planned})
        self.planned = len(planned)
        self.layers = list(dict.fromkeys(name for cell in self.cells for name in cell.layers))
        tasks = [cell.manifest["task"] for cell in self.cells]
        classes = max((t["outputs"] for t in tasks if t["kind"] == "classification"), default=0)
        self.guessing = 1 / classes if classes else None
        """Share of right answers that guessing gives, where there are classes to guess."""
        self.tested = min(
            (min(c.manifest["task"]["test"], c.settings["test_limit"]) for c in self.cells),
            default=0,
        )
        """Test examples behind every test accuracy."""
        self.steps = max((int(cell.settings["steps"]) for cell in self.cells), default=0)
        self._at: dict[tuple[str, float], list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: int(cell.settings["seed"])):
            place = (str(cell.settings["norm"]), float(cell.settings["lr"]))
            self._at.setdefault(place, []).append(cell)

    def at(self, arm: Arm, rate: float) -> list[Cell]:
        """The cells of one arm at one learning rate that have started, by seed."""
        return self._at.get((arm.name, rate), [])

    def of_arm(self, arm: Arm) -> list[Cell]:
        """The cells of one arm that have started, by learning rate and seed."""
        return [cell for rate in self.rates for cell in self.at(arm, rate)]

    def series(
        self, arm: Arm, rate: float, quantity: str, layer: str = "", index: int = 0
    ) -> Series | None:
        """One quantity over the seeds; ``None`` where it was not measured."""
        return across([cell.series(quantity, layer, index) for cell in self.at(arm, rate)])

    def has(self, quantity: str) -> bool:
        """Whether any cell measured the quantity for the whole network."""
        return any(cell.series(quantity) for cell in self.cells)


def measured_layers(grid: Grid, quantity: str) -> list[str]:
    """The layers for which a quantity was measured, first to last."""
    return [
        layer for layer in grid.layers if any(cell.series(quantity, layer) for cell in grid.cells)
    ]
