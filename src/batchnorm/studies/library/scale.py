"""[P1] Section 3.3: the scale of weights in front of batch norm, and what it does to training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from batchnorm.records import Cell, Run
from batchnorm.report.grid import across
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel, Rule, fit
from batchnorm.studies.scale_invariance import (
    FACTORS,
    IDENTITIES,
    MEASURED,
    WAYS,
    IdentityCell,
    TrainingCell,
    run,
)
from batchnorm.studies.settings import CellBase, PositiveRate, SettingsError, StudySettings
from batchnorm.studies.study import Study
from batchnorm.verdicts import Above, Below, Claim, Within

_ROUNDING = 1e-12
"""Relative, float64: sums of some hundred products, each rounded at 1e-16."""

LINES = (
    *(f"{name}, ε = 0" for name in IDENTITIES),
    "output, ε = 1e−5",
    *WAYS.values(),
)


class Settings(StudySettings):
    """A layer of 16 units on Gaussian data, batch norm, tanh and a classifier; float64."""

    steps: Annotated[int, Field(ge=MEASURED)] = 5000
    """Steps of SGD."""

    lr: PositiveRate = 0.1
    """Learning rate."""

    weight_decay: PositiveRate = 0.01
    """Weight decay λ of the layer in front of batch norm, where it has any."""


def check(settings: Settings) -> None:
    """See that the run is long enough for the equilibrium, which is approached as exp(−2ηλt).

    Raises:
        SettingsError: it is not.
    """
    product = settings.lr * settings.weight_decay
    if settings.steps < (least := round(5 / product)):
        raise SettingsError(
            f"steps={settings.steps} are too few for the equilibrium of lr × weight_decay = "
            f"{product:g}. Give at least {least}, or a larger weight_decay."
        )


def cells(settings: Settings) -> list[CellBase]:
    found: list[CellBase] = []
    for seed in range(settings.seeds):
        found.append(IdentityCell(seed=seed))
        found += [
            TrainingCell(
                seed=seed,
                line=way,
                steps=settings.steps,
                lr=settings.lr,
                weight_decay=settings.weight_decay if way.startswith("decay") else 0.0,
            )
            for way in WAYS
        ]
    return found


Effects = dict[int, float]


def _largest(quantity: str, line: str) -> Callable[[Run], Effects]:
    def measure(run: Run) -> Effects:
        cells = run.by_seed(line=line)
        return {seed: max(cell.series(quantity).values()) for seed, cell in cells.items()}

    return measure


def _late(cell: Cell, quantity: str) -> float:
    """Root of the mean square over the last third, when the equilibrium is reached."""
    series = list(cell.series(quantity).values())
    return float(np.sqrt(np.mean(np.square(series[-(len(series) // 3) :]))))


def _angle_off(run: Run) -> Effects:
    found = {}
    for seed, cell in run.by_seed(line="decay").items():
        eta, decay = (float(cell.settings[name]) for name in ("lr", "weight_decay"))
        found[seed] = _late(cell, "scale/angle") / (2 * eta * decay) ** 0.5 - 1
    return found


def _growth(run: Run) -> Effects:
    """How far the weights grew in the second half of the run, over the first."""
    found = {}
    for seed, cell in run.by_seed(line="free").items():
        norms = list(cell.series("scale/norm").values())
        half = norms[len(norms) // 2]
        found[seed] = (norms[-1] - half) / (half - norms[0])
    return found


def _remembered(run: Run, way: str) -> Effects:
    """Effective learning rate of the usual initial weights over that of ten times larger ones."""
    small, large = run.by_seed(line=way), run.by_seed(line=f"{way}-large")
    return {
        seed: _late(cell, "scale/effective_lr") / _late(large[seed], "scale/effective_lr")
        for seed, cell in small.items()
        if seed in large
    }


def _line(
    cells: Mapping[int, Cell], quantity: str, arm: int, x: Sequence[float] | None = None
) -> list[Line]:
    series = across([cell.series(quantity) for cell in cells.values()])
    if series is None:
        return []
    steps = series.x if x is None else np.array(x)[series.x.astype(int)]
    return [Line(arm, steps, series.y, series.low, series.high)]


def _curves(run: Run, quantity: str) -> list[Line]:
    first = len(IDENTITIES) + 1
    return [
        line
        for index, way in enumerate(WAYS)
        for line in _line(run.by_seed(line=way), quantity, first + index)
    ]


def figures(run: Run) -> list[Chart]:
    band = "smallest to largest over the seeds"
    cells = run.by_seed(line="identities")
    names = (*IDENTITIES, "output with epsilon")
    identities = [
        line
        for index, name in enumerate(names)
        for line in _line(cells, f"identity/{name}", index, FACTORS)
    ]
    rate, norm, angle = (
        _curves(run, f"scale/{name}") for name in ("effective_lr", "norm", "angle")
    )
    equilibria = {
        (2 * float(c.settings["lr"]) * float(c.settings["weight_decay"])) ** 0.5
        for c in run.by_seed(line="decay").values()
    }
    rules = [Rule(value, "√(2ηλ)") for value in equilibria]
    return [
        Chart(
            id="identities",
            title="What a factor on the weights changes",
            how="Relative difference from the layer with a = 1; 1e−16 is rounding. With ε > 0 "
            "small weights lose against it.",
            source=f"{P1}, Section 3.3",
            x=Axis("a", type="log"),
            y=Axis("relative difference", type="log"),
            panels=[Panel("", identities, domain=(1e-17, 10.0))] if identities else [],
            band=band,
        ),
        Chart(
            id="effective-rate",
            title="Effective learning rate",
            how="η/‖w‖², the rate at which the direction of a unit's weights learns. Compare the "
            "two initial scales.",
            source="arXiv 1706.05350",
            x=Axis("step"),
            y=Axis("η/‖w‖²", type="log"),
            panels=[Panel("", rate, domain=fit(rate, log=True))] if rate else [],
            band=band,
        ),
        Chart(
            id="norm",
            title="Size of the weights",
            how="Root of the mean ‖w‖² of the units. Without decay it only grows, since the "
            "gradient stands at right angles to the weights.",
            source=f"{P1}, Section 3.3; arXiv 1706.05350",
            x=Axis("step"),
            y=Axis("‖w‖", type="log"),
            panels=[Panel("", norm, domain=fit(norm, log=True))] if norm else [],
            band=band,
        ),
        Chart(
            id="angle",
            title="Turn of the weights in one step",
            how="Angle between a unit's weights before and after an update, root of the mean "
            "square. With decay it settles at √(2ηλ), whatever the loss and the initial weights.",
            source="arXiv 1706.05350",
            x=Axis("step"),
            y=Axis("angle, radians", type="log"),
            panels=[Panel("", angle, domain=fit(angle, log=True), rules=rules)] if angle else [],
            band=band,
        ),
    ]


def _identity(name: str, sentence: str, reported: str) -> Claim:
    return Claim(
        id=name.replace(" ", "-"),
        sentence=sentence,
        source="[P1] Section 3.3",
        reported=reported,
        effect="largest relative difference for a from 0.001 to 1,000, at ε = 0",
        measure=_largest(f"identity/{name}", "identities"),
        rule=Within(_ROUNDING),
        figures=("identities",),
    )


STUDY = Study(
    name="scale",
    question="Does the scale of the weights in front of batch norm make no difference to what "
    "the layer computes, and what is left of it in training?",
    source="[P1] Section 3.3",
    settings=Settings,
    scales={
        "quick": Settings(),
        "full": Settings(steps=100_000, weight_decay=1e-3, seeds=10),
    },
    cells=cells,
    check=check,
    run=run,
    figures=figures,
    lines=LINES,
    claims=[
        _identity(
            "output", "A factor on the weights does not change the output", "BN(Wu) = BN((aW)u)"
        ),
        _identity(
            "input gradient",
            "It does not change the gradient that the layer passes on",
            "∂BN((aW)u)/∂u = ∂BN(Wu)/∂u",
        ),
        _identity(
            "weight gradient",
            "It divides the gradient of the weights: larger weights get smaller gradients",
            "∂BN((aW)u)/∂(aW) = (1/a) ∂BN(Wu)/∂W",
        ),
        Claim(
            id="epsilon",
            sentence="With ε > 0 a unit's output shrinks by √(1 + ε/(a²σ²)), and the identities "
            "are no longer exact",
            source="[P1] Section 3.3 with Algorithm 1",
            reported="ε is not spoken of",
            effect="largest relative difference from that closed form, ε = 1e−5",
            measure=_largest("identity/closed form", "identities"),
            rule=Within(_ROUNDING),
            figures=("identities",),
        ),
        Claim(
            id="right-angle",
            sentence="The gradient stands at right angles to the weights: without decay "
            "‖w‖² grows in each step by η²‖g‖²",
            source="arXiv 1706.05350",
            reported="follows from the identities",
            effect="largest relative difference of ‖w‖² from that, over all steps and units",
            measure=_largest("scale/deviation", "free"),
            rule=Within(_ROUNDING),
            figures=("norm",),
        ),
        Claim(
            id="growth",
            sentence="Batch norm stabilises the growth of the weights",
            source="[P1] Section 3.3",
            reported="will stabilise the parameter growth; asked for: half",
            effect="growth of ‖w‖ in the second half of a run without decay, over the first half",
            measure=_growth,
            rule=Below(0.5, null=1.0),
            figures=("norm",),
        ),
        Claim(
            id="equilibrium",
            sentence="With weight decay λ the weights settle where each step turns them by √(2ηλ)",
            source="arXiv 1706.05350",
            reported="the effective rate follows from η and λ alone; asked for: within 5%",
            effect="angle over √(2ηλ) − 1, over the last third of the run",
            measure=_angle_off,
            rule=Within(0.05),
            figures=("angle",),
            percent=True,
        ),
        Claim(
            id="forgotten",
            sentence="With weight decay the initial scale of the weights is forgotten",
            source="arXiv 1706.05350",
            reported="asked for: effective learning rates within 20% of each other",
            effect="|ln| of the effective learning rate of the usual initial weights over that of "
            "ten times larger ones, last third of the run",
            measure=lambda run: {s: abs(np.log(e)) for s, e in _remembered(run, "decay").items()},
            rule=Below(0.2),
            figures=("effective-rate",),
        ),
        Claim(
            id="remembered",
            sentence="Without weight decay it is not: ten times larger weights go on learning "
            "more slowly",
            source="[P1] Section 3.3",
            reported="larger weights lead to smaller gradients; asked for: twice",
            effect="effective learning rate of the usual initial weights over that of ten times "
            "larger ones, last third of the run",
            measure=lambda run: _remembered(run, "free"),
            rule=Above(2.0, null=1.0),
            ratio=True,
            figures=("effective-rate",),
        ),
    ],
)
