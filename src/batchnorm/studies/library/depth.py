"""Gradients that vanish or explode with depth, and how deep a network can be to learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from batchnorm.records import Cell, Record, Run
from batchnorm.report.grid import Vector, across
from batchnorm.report.spec import Axis, Chart, Line, Panel, Rule, fit
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.depths import (
    DepthCell,
    DepthSettings,
    by_depth,
    check_depths,
    depth_cells,
)
from batchnorm.studies.settings import CellBase
from batchnorm.studies.study import Study, train
from batchnorm.verdicts import Above, Below, CannotTellError, Claim, Within

NORMS = ("none", "batch")

Saturating = Literal["sigmoid", "tanh", "relu"]
ACTIVATIONS: tuple[Saturating, ...] = ("sigmoid", "tanh", "relu")

RELU_FACTOR = math.pi / (math.pi - 1)
"""arXiv 1902.08129: of the squared gradient, a layer of ReLUs behind batch norm."""

_MEAN_FIELD = "arXiv 1902.08129"
_VANISHED, _KEPT = 3.0, 1.0
"""Decades lost over all layers: a thousandth is left, or a tenth."""
_FINITE = 0.05
"""Relative: the theory is of infinite width and large batches, and corrections are of 1/100."""
_LEARNED = 0.5

Effects = dict[int, float]


class Settings(DepthSettings):
    """Networks at initialisation, and trained ones of several depths; see docs/studies/depth.md."""

    layers: Annotated[int, Field(ge=3)] = 40
    """Layers of the networks at initialisation."""

    units: Annotated[int, Field(ge=2)] = 200
    """Units of each of those layers."""

    batch: Annotated[int, Field(ge=3)] = 128
    """Examples whose gradients are taken there."""

    draws: Annotated[int, Field(ge=1)] = 3
    """Networks drawn for each seed."""


class GradientCell(CellBase):
    """Networks at initialisation, drawn anew in each step."""

    activation: Saturating
    norm: str
    layers: int
    width: int
    batch: int
    draws: int

    @property
    def units(self) -> int:
        """Networks drawn."""
        return self.draws


def cells(settings: Settings) -> list[CellBase]:
    drawn: list[CellBase] = [
        GradientCell(
            activation=activation,
            norm=norm,
            seed=seed,
            layers=settings.layers,
            width=settings.units,
            batch=settings.batch,
            draws=settings.draws,
        )
        for seed in range(settings.seeds)
        for activation in ACTIVATIONS
        for norm in NORMS
    ]
    return [*drawn, *depth_cells(settings, NORMS)]


def run(cell: GradientCell | DepthCell, at: CellRun) -> None:
    if isinstance(cell, DepthCell):
        return train(cell, at)
    from batchnorm.studies.propagation import gradient_norms

    for draw in at.steps(cell.draws):
        found = gradient_norms(
            cell.activation,
            cell.norm,
            layers=cell.layers,
            width=cell.width,
            batch=cell.batch,
        )
        at.write(
            Record(draw, "", "depth/gradient", norm, layer) for layer, norm in enumerate(found)
        )
    return None


def _drawn(run: Run, activation: str, norm: str) -> dict[int, Cell]:
    return run.by_seed(activation=activation, norm=norm, task=None)  # cells that train have one


def _gradients(cell: Cell) -> Vector:
    """‖∂ℓ/∂h_l‖ by draw and l = 1 … L; the inputs, which no nonlinearity made, are left out."""
    layers = range(1, int(cell.settings["layers"]) + 1)
    return np.array([[*cell.series("depth/gradient", index=i).values()] for i in layers]).T


def _lost(run: Run, activation: str, norm: str) -> Effects:
    """Decades of the gradient's norm from the last layer to the first, mean over the draws."""
    return {
        seed: float(-np.log10(g[:, 0] / g[:, -1]).mean())
        for seed, cell in _drawn(run, activation, norm).items()
        for g in [_gradients(cell)]
    }


def _most_lost(run: Run) -> Effects:
    lost = [_lost(run, activation, "batch") for activation in ACTIVATIONS]
    return {seed: max(one[seed] for one in lost) for seed in set.intersection(*map(set, lost))}


def _gained(run: Run) -> Effects:
    """As a share of what theory has for as many layers."""
    found = {}
    for seed, cell in _drawn(run, "relu", "batch").items():
        expected = (int(cell.settings["layers"]) - 1) * math.log10(RELU_FACTOR) / 2
        found[seed] = -_lost(run, "relu", "batch")[seed] / expected
    return found


def _factors(cell: Cell) -> Vector:
    """Of the squared norm, from each layer to the one before it, mean over the draws."""
    g = _gradients(cell)
    factors: Vector = ((g[:, :-1] / g[:, 1:]) ** 2).mean(0)
    return factors


def _off(run: Run) -> Effects:
    """How far the mean factor is from π/(π−1), relative."""
    return {
        seed: float(_factors(cell).mean()) / RELU_FACTOR - 1
        for seed, cell in _drawn(run, "relu", "batch").items()
    }


def _deepest(by: dict[int, float]) -> int:
    learning = [depth for depth, share in by.items() if share >= _LEARNED]
    if not learning:
        raise CannotTellError("A network learns at none of these depths")
    return max(learning)


def _deeper(run: Run) -> Effects:
    """Deepest network that learns with batch norm over the deepest without."""
    plain, normed = (by_depth(run, norm) for norm in NORMS)
    return {s: _deepest(normed[s]) / _deepest(plain[s]) for s in normed if s in plain}


def _too_deep(run: Run) -> Effects:
    """With batch norm: what is learned at the best depth minus at the largest."""
    return {s: max(by.values()) - by[max(by)] for s, by in by_depth(run, "batch").items()}


def _lines(measured: Sequence[Sequence[Mapping[int, float]]]) -> list[Line]:
    """One line for each norm, from the curves of its seeds."""
    found = [(arm, across(seeds)) for arm, seeds in enumerate(measured) if seeds]
    return [Line(arm, s.x, s.y, s.low, s.high) for arm, s in found if s is not None]


def _panels(run: Run, of: Callable[[Cell], Vector], *, log: bool = False) -> list[Panel]:
    """A panel for each activation: what ``of`` has of the layers 1 to L."""
    panels = []
    for activation in ACTIVATIONS:
        lines = _lines(
            [
                [dict(enumerate(of(c).tolist(), 1)) for c in _drawn(run, activation, n).values()]
                for n in NORMS
            ]
        )
        rules = [Rule(RELU_FACTOR, "π/(π−1)")] if activation == "relu" and not log else []
        if lines:
            panels.append(Panel(activation, lines, domain=fit(lines, log=log), rules=rules))
    return panels


def _relative(cell: Cell) -> Vector:
    """Over the last layer's, geometric mean over the draws."""
    g = np.log(_gradients(cell))
    relative: Vector = np.exp((g - g[:, -1:]).mean(0))
    return relative


def figures(run: Run) -> list[Chart]:
    band = "smallest to largest over the seeds"
    learning = _lines([list(by_depth(run, norm).values()) for norm in NORMS])
    depths = [float(depth) for depth in learning[0].x] if learning else None
    return [
        Chart(
            id="gradient",
            title="The gradient by layer at initialisation",
            how="‖∂ℓ/∂h_l‖ over that of the last layer, a panel for each nonlinearity. Read from "
            "the right: the gradient comes from the last layer.",
            source=f"[P1]; {_MEAN_FIELD}",
            x=Axis("layer"),
            y=Axis("gradient, over the last layer's", type="log"),
            panels=_panels(run, _relative, log=True),
            band=band,
            columns=3,
        ),
        Chart(
            id="factor",
            title="What one layer does to the squared gradient",
            how="‖∂ℓ/∂h_l‖² over ‖∂ℓ/∂h_{l+1}‖². At 1 the gradient neither vanishes nor explodes.",
            source=_MEAN_FIELD,
            x=Axis("layer"),
            y=Axis("factor"),
            panels=_panels(run, _factors),
            band=band,
            columns=3,
        ),
        Chart(
            id="learning",
            title="How deep a network can be to learn",
            how="The share of the loss of guessing that is gone at the end on training batches, at "
            "the better of the learning rates: 1 has learned everything, 0 nothing.",
            source=f"[P1]; {_MEAN_FIELD}",
            x=Axis("hidden layers", type="log", ticks=depths),
            y=Axis("learned", percent=True),
            panels=[Panel("", learning, domain=fit(learning))] if learning else [],
            band=band,
            dots=True,
        ),
    ]


def _vanishes(activation: Saturating, sentence: str) -> Claim:
    return Claim(
        id=f"{activation}-vanishes",
        sentence=sentence,
        source="[P1], before batch norm",
        reported="gradients vanish in deep networks; asked for: 3 decades, and 1 is no effect",
        effect="decades of ‖∂ℓ/∂h‖ lost from the last layer to the first, at initialisation",
        measure=lambda run: _lost(run, activation, "none"),
        rule=Above(_VANISHED, null=_KEPT),
        figures=("gradient",),
    )


STUDY = Study(
    name="depth",
    question="How does the gradient vanish or explode with depth, what does batch norm change, "
    "and how deep can a network be to learn?",
    source=f"[P1]; {_MEAN_FIELD}",
    settings=Settings,
    scales={
        "quick": Settings(steps=100, every=5, width=50, probes=("loss",)),
        "full": Settings(
            task="mnist",
            layers=100,
            units=1000,
            batch=256,
            draws=10,
            depths=(2, 5, 10, 20, 30, 40, 60, 80),
            lrs=(0.001, 0.01, 0.1, 1.0),
            steps=10_000,
            every=100,
            probes=("loss",),
            seeds=5,
        ),
    },
    cells=cells,
    run=run,
    check=check_depths,
    built_in_only=True,
    figures=figures,
    claims=[
        _vanishes("sigmoid", "In a deep network of sigmoids the gradient vanishes"),
        _vanishes("tanh", "So it does in one of tanh units"),
        _vanishes("relu", "So it does in one of ReLUs, with Glorot's weights"),
        Claim(
            id="no-vanishing",
            sentence="With batch norm it vanishes in none of them",
            source="[P1]",
            reported="backward propagation is unaffected by the scale of the parameters; asked "
            "for: less than 1 decade lost",
            effect="decades lost from the last layer to the first, the largest of the three",
            measure=_most_lost,
            rule=Below(_KEPT, null=_VANISHED),
            figures=("gradient",),
        ),
        Claim(
            id="explodes",
            sentence="With batch norm the gradient of a ReLU network explodes instead",
            source=_MEAN_FIELD,
            reported="by √(π/(π−1)) a layer; asked for: half of those decades",
            effect="decades gained from the last layer to the first, over the theory's",
            measure=_gained,
            rule=Above(0.5, null=0.0),
            figures=("gradient",),
        ),
        Claim(
            id="factor",
            sentence="Its square grows by π/(π−1) ≈ 1.467 a layer",
            source=_MEAN_FIELD,
            reported="π/(π−1), for infinite width and large batches; asked for: 5%",
            effect="mean factor over the layers and draws, relative difference",
            measure=_off,
            rule=Within(_FINITE),
            figures=("factor",),
            percent=True,
        ),
        Claim(
            id="deeper",
            sentence="Batch norm trains deeper networks",
            source="[P1]",
            reported="no number; asked for: twice as deep",
            effect="deepest network that loses half of the loss of guessing, batch norm over none",
            measure=_deeper,
            rule=Above(2.0, null=1.0),
            ratio=True,
            figures=("learning",),
        ),
        Claim(
            id="too-deep",
            sentence="A network can be too deep even with batch norm",
            source=_MEAN_FIELD,
            reported="deep networks with batch norm alone cannot be trained; asked for: half of "
            "the loss",
            effect="share of the loss of guessing that is gone, best depth minus largest",
            measure=_too_deep,
            rule=Above(0.5, null=0.0),
            figures=("learning",),
            percent=True,
        ),
    ],
)
