"""[P2] Figure 4: how the loss and its gradient change along the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from batchnorm.records import Cell, Run
from batchnorm.report.charts import landscape, performance
from batchnorm.report.grid import Grid, Vector
from batchnorm.report.spec import Chart
from batchnorm.studies.measures import pairs, values
from batchnorm.studies.settings import CellSettings
from batchnorm.studies.study import Study
from batchnorm.studies.two_networks import (
    TwoNetworks,
    check_two,
    deep_linear,
    network,
    of_both,
    two_networks,
)
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

_SETTLED = 1 / 6
"""Share of the run after which the smoothness is read: step 2,500 of the paper's 15,000."""


class Settings(TwoNetworks):
    """[P2] Section 3.1 where it says what was done; see docs/studies/landscape.md for the rest."""


def cells(settings: Settings) -> list[CellSettings]:
    return two_networks(settings)


def _variation(cell: Cell) -> float:
    """The median over the steps of largest − smallest loss, over the smallest."""
    low, high = (cell.series(f"landscape/loss_{end}") for end in ("low", "high"))
    with_both = [high[step] / low[step] - 1 for step in low if low[step] > 0]
    finite = [value for value in with_both if math.isfinite(value)]
    if not finite:
        raise CannotTellError(f"Cell {cell.folder.name} has no finite loss along its gradient")
    return float(np.median(finite))


def _change(cell: Cell) -> float:
    return float(np.median(values(cell, "landscape/gradient_high")))


def _smoothness(cell: Cell) -> Vector:
    start = math.ceil(_SETTLED * int(cell.settings["steps"]))
    return values(cell, "landscape/smoothness", after=start)


def _beta(cell: Cell) -> float:
    return float(np.median(_smoothness(cell)))


def _spread(cell: Cell) -> float:
    """Ln of the 95th over the 5th percentile of the smoothness."""
    low, high = np.quantile(_smoothness(cell), [0.05, 0.95])
    return math.log(high / low)


def _ratio(run: Run, measure: Callable[[Cell], float]) -> dict[int, float]:
    """Without batch norm over with it."""
    found = {}
    for seed, (plain, normed) in pairs(run).items():
        if not (below := measure(normed)):
            raise CannotTellError(f"Nothing changes along the gradient of seed {seed}")
        found[seed] = measure(plain) / below
    return found


def _plateau(run: Run) -> dict[int, float]:
    """How far β·η/2 is from 1, for the arm that is further."""
    found = {}
    for seed, both in pairs(run).items():
        found[seed] = max(abs(_beta(cell) * float(cell.settings["lr"]) / 2 - 1) for cell in both)
    return found


def _charts(grid: Grid) -> list[Chart]:
    measured = [
        landscape.loss_variation(grid),
        landscape.predictiveness(grid),
        landscape.smoothness(grid),
    ]
    return [*measured, performance.loss(grid)]


def figures(run: Run) -> list[Chart]:
    return of_both(run, _charts)


def _claims(part: Callable[[Run], Run], which: str, prefix: str, source: str) -> list[Claim]:
    """The three claims of Figure 4 for one network; the paper's numbers are of the VGG."""
    vgg = not prefix
    return [
        Claim(
            id=f"{prefix}loss",
            sentence=f"The loss varies less along the gradient with batch norm ({which})",
            source=f"[P2] {source}(a)",
            reported="largest over smallest loss 1.67 without and 1.17 with: 3.9 times the "
            "variation; asked for: half of that"
            if vgg
            else "less",
            effect="largest − smallest loss over the smallest, median over the steps, without "
            "over with",
            measure=lambda run: _ratio(part(run), _variation),
            rule=Above(1.95, null=1.0) if vgg else Above(1.0),
            ratio=True,
            figures=(f"{prefix}loss-variation",),
        ),
        Claim(
            id=f"{prefix}gradient",
            sentence=f"The gradient predicts itself further with batch norm ({which})",
            source=f"[P2] {source}(b)",
            reported="median change of the gradient 77.6 without and 25.0 with: 3.1 times; asked "
            "for: half of that"
            if vgg
            else "less change",
            effect="largest change of the gradient along it, median over the steps, without over "
            "with",
            measure=lambda run: _ratio(part(run), _change),
            rule=Above(1.55, null=1.0) if vgg else Above(1.0),
            ratio=True,
            figures=(f"{prefix}predictiveness",),
        ),
        Claim(
            id=f"{prefix}smoothness",
            sentence=f"The effective smoothness is better with batch norm ({which})",
            source=f"[P2] {source}(c)",
            reported="improved, by the text; medians of 19.99 without and 19.96 with, by its figure"
            if vgg
            else "improved",
            effect="effective β, median over the last five sixths of the run, without over with",
            measure=lambda run: _ratio(part(run), _beta),
            rule=Above(1.0),
            ratio=True,
            figures=(f"{prefix}smoothness",),
        ),
    ]


STUDY = Study(
    name="landscape",
    question="Does batch norm make the loss vary less along the gradient, and the gradient "
    "predict itself further?",
    source="[P2] Section 3.1, Figure 4",
    settings=Settings,
    scales={
        "quick": Settings(
            model="cnn",
            batch_size=60,
            steps=300,
            probes=("loss", "landscape"),
            every=10,
            linear_steps=400,
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="vgg",
            init_scale=1.4142135623730951,
            batch_size=128,
            steps=15_000,
            every=100,
            probes=("loss", "landscape", "performance"),
            landscape_points=8,
        ),
    },
    cells=cells,
    check=check_two,
    figures=figures,
    claims=[
        *_claims(network, "network", "", "Figure 4"),
        Claim(
            id="two-orders",
            sentence="The gradients differ by close to two orders of magnitude",
            source="[P2] Section 3.1",
            reported="close to two orders of magnitude in the text, 3.1 times in the figure; "
            "asked for: one and a half orders",
            effect="as above: largest change of the gradient, without over with",
            measure=lambda run: _ratio(network(run), _change),
            rule=Above(10**1.5, null=1.0),
            ratio=True,
            figures=("predictiveness",),
        ),
        Claim(
            id="steadier",
            sentence="The effective smoothness varies less over the training with batch norm",
            source="[P2] Figure 4(c), read critically",
            reported="5.1 to 38.1 without, 18.0 to 20.9 with: 13 times the range on a log scale; "
            "asked for: twice",
            effect="ln of the 95th over the 5th percentile of β, without over with",
            measure=lambda run: _ratio(network(run), _spread),
            rule=Above(2.0, null=1.0),
            ratio=True,
            figures=("smoothness",),
        ),
        Claim(
            id="edge",
            sentence="Both arms stand at the edge of stability, β = 2 / learning rate",
            source="[P2] Figure 4(c), read with Cohen et al. 2021, arXiv 2103.00065",
            reported="19.99 and 19.96 at learning rate 0.1, where 2 / learning rate is 20",
            effect="|β · learning rate / 2 − 1| of the arm that is further from it; asked for: 0.1",
            measure=lambda run: _plateau(network(run)),
            rule=Below(0.1),
            figures=("smoothness",),
        ),
        *_claims(deep_linear, "deep linear network", "linear-", "Section 3.1"),
    ],
)
