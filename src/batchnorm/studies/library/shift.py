"""[P2] Definition 2.1: does batch norm reduce internal covariate shift?"""

from __future__ import annotations

import numpy as np

from batchnorm.records import Cell, Run
from batchnorm.report.charts import performance, shift
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
from batchnorm.verdicts import Above, Claim


class Settings(TwoNetworks):
    """[P2] Section 2.2 where it says what was done; see docs/studies/shift.md for the rest."""


def cells(settings: Settings) -> list[CellSettings]:
    return two_networks(settings)


def _median(cell: Cell, quantity: str) -> float:
    """Over the steps and all layers but the first, which has none before it."""
    return float(np.median(values(cell, quantity, cell.layers[1:])))


def _distance(run: Run) -> dict[int, float]:
    """‖G − G′‖ with batch norm over without."""
    return {
        seed: _median(normed, "shift/l2") / _median(plain, "shift/l2")
        for seed, (plain, normed) in pairs(run).items()
    }


def _turned(run: Run) -> dict[int, float]:
    """cos∠(G, G′) without batch norm minus with it."""
    return {
        seed: _median(plain, "shift/cosine") - _median(normed, "shift/cosine")
        for seed, (plain, normed) in pairs(run).items()
    }


def _cosine(run: Run, norm: str) -> dict[int, float]:
    return {seed: _median(c, "shift/cosine") for seed, c in run.by_seed(norm=norm).items()}


def figures(run: Run) -> list[Chart]:
    return of_both(
        run, lambda grid: [shift.distance(grid), shift.cosine(grid), performance.loss(grid)]
    )


STUDY = Study(
    name="shift",
    question="Does batch norm reduce internal covariate shift, the change of a layer's gradient "
    "by the update of the layers before it?",
    source="[P2] Section 2.2, Definition 2.1, Figure 3",
    settings=Settings,
    scales={
        "quick": Settings(
            model="cnn", batch_size=60, steps=300, probes=("loss", "shift"), linear_steps=600
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="vgg",
            init_scale=1.4142135623730951,
            batch_size=128,
            steps=15_000,
            every=100,
            probes=("loss", "shift", "performance"),
        ),
    },
    cells=cells,
    check=check_two,
    figures=figures,
    claims=[
        Claim(
            id="distance",
            sentence="Batch norm does not reduce the distance of the gradients (network)",
            source="[P2] Section 2.2, Figure 3",
            reported="often an increase; asked for: no less than without, half as much being a "
            "reduction",
            effect="median ‖G − G′‖ over steps and layers, with batch norm over without",
            measure=lambda run: _distance(network(run)),
            rule=Above(1.0, null=0.5),
            ratio=True,
            figures=("shift-distance",),
        ),
        Claim(
            id="angle",
            sentence="Batch norm does not bring the gradients closer in angle (network)",
            source="[P2] Section 2.2, Figure 3",
            reported="often further apart; asked for: no closer than without, 0.1 closer being a "
            "reduction",
            effect="median cos∠(G, G′) over steps and layers, without batch norm minus with",
            measure=lambda run: _turned(network(run)),
            rule=Above(0.0, null=-0.1),
            figures=("shift-cosine",),
        ),
        Claim(
            id="linear-none",
            sentence="The deep linear network has almost no shift without batch norm",
            source="[P2] Section 2.2, Figure 3",
            reported="gradients almost the same, cosine near 1; asked for: 0.95",
            effect="median cos∠(G, G′) without batch norm",
            measure=lambda run: _cosine(deep_linear(run), "none"),
            rule=Above(0.95, null=0.0),
            figures=("linear-shift-cosine",),
        ),
        Claim(
            id="linear-batch",
            sentence="With batch norm its gradients before and after are almost uncorrelated",
            source="[P2] Section 2.2, Figure 3",
            reported="almost uncorrelated; asked for: half of the way from 1 to 0",
            effect="median cos∠(G, G′), without batch norm minus with",
            measure=lambda run: _turned(deep_linear(run)),
            rule=Above(0.5, null=0.0),
            figures=("linear-shift-cosine",),
        ),
        Claim(
            id="linear-distance",
            sentence="Batch norm does not reduce the distance of its gradients",
            source="[P2] Section 2.2, Figure 3",
            reported="larger with batch norm; asked for: no less than without, half as much being "
            "a reduction",
            effect="median ‖G − G′‖ over steps and layers, with batch norm over without",
            measure=lambda run: _distance(deep_linear(run)),
            rule=Above(1.0, null=0.5),
            ratio=True,
            figures=("linear-shift-distance",),
        ),
    ],
)
