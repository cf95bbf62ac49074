"""[P2] Section 3.3: is it batch norm's particular normalisation that smooths the landscape?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from batchnorm.records import Cell, Run
from batchnorm.report.charts import landscape, performance
from batchnorm.report.grid import Grid
from batchnorm.report.spec import Chart
from batchnorm.studies.callables import is_callable_name
from batchnorm.studies.measures import early_mean, last, pairs, values
from batchnorm.studies.settings import CellSettings, SettingsError, distinct
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

ORDERS = ("l1", "l2", "linf")
OTHERS = ("layer", "group", "weight")

Effects = dict[int, float]


class Settings(TwoNetworks):
    """[P2] Section 3.3 where it says what was done; see docs/studies/norms.md for the rest."""

    norm: Annotated[tuple[str, ...], AfterValidator(distinct)] | None = None
    """Arms of both networks; by default all, without weight for a network of your own."""


def arms(settings: Settings) -> tuple[str, ...]:
    """The arms: those asked for, or all that the network can have."""
    if settings.norm is not None:
        return settings.norm
    own = is_callable_name(settings.model)  # whose linear operations nobody else can make
    return ("none", "batch", *ORDERS, *(name for name in OTHERS if not own or name != "weight"))


def cells(settings: Settings) -> list[CellSettings]:
    return two_networks(settings, arms(settings))


def check(settings: Settings) -> None:
    check_two(settings)
    if missing := {"none", "batch"} - set(arms(settings)):
        raise SettingsError(
            f"norm={','.join(arms(settings))}: everything is compared with none and batch, and "
            f"{' and '.join(sorted(missing))} is not among them."
        )


def _by_norm(run: Run, measure: Callable[[Cell], float]) -> dict[int, dict[str, float]]:
    """The number of each arm, for the seeds that have all of them."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in run.cells:
        norm = str(cell.settings["norm"])
        found.setdefault(norm, run.by_seed(norm=norm))
    seeds = set.intersection(*map(set, found.values())) if found else set()
    return {s: {norm: measure(of[s]) for norm, of in found.items()} for s in sorted(seeds)}


def _among(values: Mapping[str, float], names: tuple[str, ...]) -> list[float]:
    if any(name not in values for name in names):
        raise CannotTellError(f"The run has not all of the arms {', '.join(names)}")
    return [values[name] for name in names]


def _accuracy(cell: Cell) -> float:
    return early_mean(cell, "train/accuracy")


def _loss(cell: Cell) -> float:
    return last(cell, "batch/loss")


def _change(cell: Cell) -> float:
    return float(np.median(values(cell, "landscape/gradient_high")))


def _shares(run: Run, names: tuple[str, ...], pick: Callable[[list[float]], float]) -> Effects:
    """Of batch norm's gain in accuracy over none, what the arm that ``pick`` chooses has."""
    found = {}
    for seed, value in _by_norm(run, _accuracy).items():
        whole = value["batch"] - value["none"]
        if whole <= 0:
            raise CannotTellError(f"Batch norm itself gains nothing for seed {seed}")
        found[seed] = (pick(_among(value, names)) - value["none"]) / whole
    return found


def _others(run: Run) -> tuple[str, ...]:
    """Those of the other norms that the run has: a network of your own lacks one of them."""
    planned = {str(entry["norm"]) for entry in run.study["cells"]}
    return tuple(name for name in OTHERS if name in planned) or OTHERS


def _losses(run: Run, make: Callable[[dict[str, float]], float]) -> Effects:
    return {seed: make(value) for seed, value in _by_norm(run, _loss).items()}


def _smoother(run: Run) -> Effects:
    """Change of the gradient without normalisation over that of the worst order."""
    return {
        seed: value["none"] / max(_among(value, ORDERS))
        for seed, value in _by_norm(run, _change).items()
    }


def _l2_differs(run: Run) -> Effects:
    """Mean |ln| of the ratio of the two losses: 0 were ℓ2 normalisation the same as batch norm."""
    found = {}
    for seed, (normed, raw) in pairs(run, ("batch", "l2")).items():
        one, other = normed.series("batch/loss"), raw.series("batch/loss")
        both = [np.log(one[s] / other[s]) for s in one if s and s in other]
        found[seed] = float(np.mean(np.abs(both)))
    return found


def figures(run: Run) -> list[Chart]:
    def charts(grid: Grid) -> list[Chart]:
        drawn = [performance.loss(grid), landscape.predictiveness(grid)]
        return [performance.accuracy(grid), *drawn] if grid.guessing else drawn

    return of_both(run, charts)


STUDY = Study(
    name="norms",
    question="Do other normalisations of the activations help as much as batch norm, and do they "
    "smooth the landscape as well?",
    source="[P2] Section 3.3",
    settings=Settings,
    scales={
        "quick": Settings(
            model="cnn",
            batch_size=60,
            steps=120,
            probes=("loss", "performance", "landscape"),
            landscape_points=3,
            test_limit=200,
            linear_steps=150,
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="vgg",
            init_scale=1.4142135623730951,
            batch_size=128,
            steps=15_000,
            every=100,
            probes=("loss", "performance", "landscape"),
        ),
    },
    cells=cells,
    check=check,
    figures=figures,
    claims=[
        Claim(
            id="orders",
            sentence="Normalising by the ℓ1, ℓ2 or ℓ∞ norm helps as batch norm does (network)",
            source="[P2] Section 3.3",
            reported="all comparable to batch norm; asked for: the worst of them has half of batch "
            "norm's gain",
            effect="training accuracy, mean over the run: the worst order's gain over none as a "
            "share of batch norm's",
            measure=lambda run: _shares(network(run), ORDERS, min),
            rule=Above(0.5, null=0.0),
            figures=("accuracy",),
            percent=True,
        ),
        Claim(
            id="smooth",
            sentence="All three make the gradient predict itself further (network)",
            source="[P2] Section 3.3",
            reported="improve the landscape's smoothness as batch norm does",
            effect="largest change of the gradient along it, median over the steps: none over the "
            "worst order",
            measure=lambda run: _smoother(network(run)),
            rule=Above(1.0),
            ratio=True,
            figures=("predictiveness",),
        ),
        Claim(
            id="others",
            sentence="So do layer norm, group norm or weight standardisation (network)",
            source="not in the papers: beside Section 3.3",
            reported="–; asked for: the best of them has half of batch norm's gain",
            effect="as above, the best of the three",
            measure=lambda run: _shares(network(run), _others(run), max),
            rule=Above(0.5, null=0.0),
            figures=("accuracy",),
            percent=True,
        ),
        Claim(
            id="linear-orders",
            sentence="Each order trains the deep linear network further than without",
            source="[P2] Section 3.3",
            reported="final losses 1652 without, 96 (ℓ1), 477 (ℓ2), 979 (ℓ∞): 1.69 times or more",
            effect="final loss without normalisation over that of the worst order",
            measure=lambda run: _losses(
                deep_linear(run), lambda v: v["none"] / max(_among(v, ORDERS))
            ),
            rule=Above(1.69, null=1.0),
            ratio=True,
            figures=("linear-loss",),
        ),
        Claim(
            id="linear-comparable",
            sentence="Each order trains it about as far as batch norm or further",
            source="[P2] Section 3.3",
            reported="475 with batch norm: the worst order ends at 2.06 times that",
            effect="final loss of the worst order over that of batch norm",
            measure=lambda run: _losses(
                deep_linear(run), lambda v: max(_among(v, ORDERS)) / v["batch"]
            ),
            rule=Below(2.06),
            ratio=True,
            figures=("linear-loss",),
        ),
        Claim(
            id="linear-l1",
            sentence="ℓ1 normalisation trains it further than batch norm",
            source="[P2] Section 3.3",
            reported="96 against 475: 4.9 times; asked for: half of that",
            effect="final loss of batch norm over that of ℓ1",
            measure=lambda run: _losses(
                deep_linear(run), lambda v: v["batch"] / _among(v, ("l1",))[0]
            ),
            rule=Above(2.45, null=1.0),
            ratio=True,
            figures=("linear-loss",),
        ),
        Claim(
            id="l2-is-not-batch",
            sentence="ℓ2 normalisation is not batch norm, as its norm is taken before the mean is "
            "removed",
            source="[P2] Section 3.3",
            reported="final losses 477 and 475: not told apart by the end",
            effect="mean |ln| of the ratio of the two losses over the run (network); asked for: 1%",
            measure=lambda run: _l2_differs(network(run)),
            rule=Above(0.01),
            figures=("loss",),
        ),
    ],
)
