"""What unnormalised inputs cost: on a quadratic, calculated, and in a network, trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from batchnorm.records import Cell, Record, Run
from batchnorm.report.grid import across
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.least_squares import InputScaling, Quadratic, scaled, theory
from batchnorm.studies.measures import last
from batchnorm.studies.settings import CellBase, CellSettings, PositiveRate, Scaling, distinct
from batchnorm.studies.study import (
    Study,
    TrainingStudySettings,
    check_data_given,
    train,
    training_cells,
)
from batchnorm.verdicts import Above, CannotTellError, Claim, Within

Data = Literal["two", "task"]
Effects = dict[int, float]

DATA: dict[Data, str] = {"two": "two features", "task": "the task's inputs"}
CALCULATED: tuple[InputScaling, ...] = ("raw", "range", "standardize")
TRAINED: tuple[Scaling, ...] = ("raw", "standardize", "skewed")
NORMS = {"none": "without batch norm", "batch": "with batch norm"}
LINES = {
    "raw": "raw",
    "range": "each divided by its largest",
    "standardize": "standardised",
    "skewed": "skewed",
}

TOLERANCE = 1e-6
"""What is left of the error when descent counts as converged."""
_SAMPLES = 1000
_LARGEST = (1.0, 2000.0)
"""The two features are uniform from 0 to these."""
_SHOWN = 24  # steps of the path
_ROUNDING = 1e-6
"""Relative: the smallest of curvatures that span 10⁷ is known to 10⁷ roundings of 1e-16, times
some hundred for the squares of the update."""


class Settings(TrainingStudySettings):
    """Linear regression, then a network on the same inputs; see docs/studies/inputs.md."""

    lr: Annotated[tuple[PositiveRate, ...], AfterValidator(distinct)] = (0.1, 1.0, 10.0)
    """Learning rates of the network; each scaling is judged at its best."""


class QuadraticCell(CellBase):
    """Gradient descent on a linear regression."""

    data: Data
    scaling: InputScaling
    task: str = ""
    """Where the inputs are from, unless they are the two features."""
    code: dict[str, str] = Field(default={})


def cells(settings: Settings) -> list[CellBase]:
    calculated = [
        QuadraticCell(
            data=data, scaling=scaling, seed=seed, task=settings.task if data == "task" else ""
        )
        for seed in range(settings.seeds)
        for data in DATA
        for scaling in CALCULATED
    ]
    trained = [
        cell
        for scaling in TRAINED
        for cell in training_cells(settings, lr=settings.lr, scaling=scaling)
    ]
    return [*calculated, *trained]


def _features(cell: QuadraticCell) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    random = np.random.default_rng(cell.seed)
    if cell.data == "two":
        return random.uniform(0, _LARGEST, (_SAMPLES, len(_LARGEST)))
    from batchnorm.studies.training import load_once

    inputs = load_once(cell.task, "raw", None).train.x.flatten(1).double().numpy()
    half: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = random.permutation(inputs)[
        : len(inputs) // 2
    ]
    return half


def run(cell: CellBase, at: CellRun) -> None:
    if isinstance(cell, CellSettings):
        train(cell, at)
    elif isinstance(cell, QuadraticCell):
        _descend(cell, at)


def _descend(cell: QuadraticCell, at: CellRun) -> None:
    for _ in at.steps(1):
        loss = Quadratic.of(scaled(_features(cell), cell.scaling))
        sizes, steps = loss.errors(loss.random(cell.seed), TOLERANCE)
        _, slowest = loss.errors(loss.worst, TOLERANCE)
        values = {
            "descent/condition": loss.condition,
            "descent/steps": steps,
            "descent/steps_worst": slowest,
            "descent/steps_theory": theory(loss.condition, TOLERANCE),
        }
        at.write(Record(0, "", name, float(value)) for name, value in values.items())
        at.write(Record(step, "", "descent/error", size) for step, size in sizes.items())
        for step, (flattest, steepest) in enumerate(loss.path(_SHOWN)):
            at.write(
                [
                    Record(step, "", "descent/flattest", float(flattest)),
                    Record(step, "", "descent/steepest", float(steepest)),
                ]
            )


def _calculated(run: Run, data: Data, scaling: InputScaling, quantity: str) -> Effects:
    found = run.by_seed(data=data, scaling=scaling)
    return {seed: cell.series(f"descent/{quantity}")[0] for seed, cell in found.items()}


def _ratio(run: Run, data: Data, quantity: str, of: InputScaling = "raw") -> Effects:
    """A number of one scaling over that of standardised inputs."""
    one, other = (_calculated(run, data, s, quantity) for s in (of, "standardize"))
    return {seed: one[seed] / other[seed] for seed in one if seed in other}


def _off_theory(run: Run) -> Effects:
    """Largest relative difference of steps and theory that rounding up to whole ones leaves."""
    found: dict[int, list[float]] = {}
    for data in DATA:
        for scaling in CALCULATED:
            steps = _calculated(run, data, scaling, "steps_worst")
            for seed, said in _calculated(run, data, scaling, "steps_theory").items():
                # What is rounded up lies 0 to 1 above; of that, the middle is taken off.
                beyond = max(0.0, abs(steps[seed] - said - 0.5) - 0.5)
                found.setdefault(seed, []).append(beyond / said)
    return {seed: max(values) for seed, values in found.items()}


def _rates(run: Run) -> list[float]:
    return sorted({float(entry["lr"]) for entry in run.study["cells"] if "lr" in entry})


def _best(run: Run, norm: str, scaling: Scaling) -> Effects:
    """Final test accuracy at the learning rate that is best for the seed."""
    found: dict[int, list[float]] = {}
    rates = _rates(run)
    for rate in rates:
        for seed, cell in run.by_seed(norm=norm, scaling=scaling, lr=rate).items():
            found.setdefault(seed, []).append(last(cell, "test/accuracy"))
    return {seed: max(tried) for seed, tried in found.items() if len(tried) == len(rates)}


def _gain(run: Run, over: Scaling) -> Effects:
    better, worse = (_best(run, "none", scaling) for scaling in ("standardize", over))
    return {seed: better[seed] - worse[seed] for seed in better if seed in worse}


def _spread(run: Run, norm: str) -> Effects:
    """Best minus worst final accuracy over the scalings."""
    tried = [_best(run, norm, scaling) for scaling in TRAINED]
    return {
        s: max(t[s] for t in tried) - min(t[s] for t in tried)
        for s in set.intersection(*map(set, tried))
    }


def _less_spread(run: Run) -> Effects:
    plain, normed = _spread(run, "none"), _spread(run, "batch")
    if plain and not any(plain.values()):
        raise CannotTellError("The scaling makes no difference without batch norm either")
    return {seed: plain[seed] - normed[seed] for seed in plain if seed in normed}


def _line(scaling: str, cells: Sequence[Cell], quantity: str) -> list[Line]:
    series = across([cell.series(quantity) for cell in cells])
    if series is None:
        return []
    return [Line([*LINES].index(scaling), series.x, series.y, series.low, series.high)]


def _errors(run: Run) -> list[Panel]:
    panels = []
    for data, title in DATA.items():
        lines = [
            line
            for scaling in CALCULATED
            for line in _line(
                scaling, [*run.by_seed(data=data, scaling=scaling).values()], "descent/error"
            )
        ]
        panels += [Panel(title, lines, domain=(TOLERANCE, 1.0))] if lines else []
    return panels


def _paths(run: Run) -> list[Panel]:
    panels = []
    for data, title in DATA.items():
        for index, scaling in enumerate(LINES):
            for cell in [*run.by_seed(data=data, scaling=scaling).values()][:1]:
                flat, steep = (
                    np.array([*cell.series(f"descent/{end}").values()])
                    for end in ("flattest", "steepest")
                )
                line = Line(index, 1 - flat / flat[0], steep / steep[0])
                panels.append(Panel(f"{title}, {LINES[scaling]}", [line], domain=(-1.1, 1.1)))
    return panels


def _accuracies(run: Run) -> list[Panel]:
    """Each scaling at the learning rate that was best for most of its seeds taken together."""
    panels = []
    for norm, title in NORMS.items():
        lines = []
        for scaling in TRAINED:
            tried = [
                [*run.by_seed(norm=norm, scaling=scaling, lr=rate).values()] for rate in _rates(run)
            ]
            ended = [found for found in tried if found and found[0].series("test/accuracy")]
            if ended:
                best = max(ended, key=lambda f: np.mean([last(c, "test/accuracy") for c in f]))
                lines += _line(scaling, best, "test/accuracy")
        panels += [Panel(title, lines, domain=(0.0, 1.0))] if lines else []
    return panels


def figures(run: Run) -> list[Chart]:
    band = "smallest to largest over the seeds"
    return [
        Chart(
            id="errors",
            title="How far gradient descent is from the minimum",
            how="Distance of the weights from the minimum as a share of where they started, at "
            "each scaling's own best learning rate. Both axes are logarithmic: a step to the right "
            "is ten times as many steps of descent.",
            source="gradient descent on a linear regression",
            x=Axis("step", type="log"),
            y=Axis("share of the error left", type="log"),
            panels=_errors(run),
            band=band,
            columns=2,
        ),
        Chart(
            id="paths",
            title="The path of gradient descent",
            how=f"The first {_SHOWN} steps from the worst start: to the right the way along the "
            "flattest direction of the valley, up and down what is left along the steepest. In a "
            "narrow valley descent jumps from wall to wall and gets nowhere; in a round one the "
            "first steps arrive.",
            source="gradient descent on a linear regression",
            x=Axis("share of the way along the flattest direction", domain=(0.0, 1.0)),
            y=Axis("share left along the steepest"),
            panels=_paths(run),
            dots=True,
            columns=3,
        ),
        Chart(
            id="accuracies",
            title="Accuracy of the network by the scaling of its inputs",
            how="Each scaling at its own best learning rate. Where the lines lie on each other, "
            "the scaling makes no difference.",
            source=f"{P1} and the inputs of a network",
            x=Axis("step"),
            y=Axis("test accuracy", percent=True),
            panels=_accuracies(run),
            band=band,
            columns=2,
        ),
    ]


_SOURCE = "not in the papers: gradient descent on a quadratic"

STUDY = Study(
    name="inputs",
    question="How much slower is optimisation on unnormalised data, and does batch norm inside "
    "the network make up for it?",
    source="not in the papers: what they start from",
    settings=Settings,
    scales={
        "quick": Settings(batch_size=60, steps=400, every=40, probes=("performance",), seeds=4),
        "full": Settings(
            task="mnist5k",
            batch_size=60,
            steps=20_000,
            every=1000,
            probes=("performance",),
            lr=(0.01, 0.1, 1.0, 10.0),
            seeds=10,
        ),
    },
    cells=cells,
    run=run,
    check=check_data_given,
    figures=figures,
    lines=tuple(LINES.values()),
    claims=[
        Claim(
            id="condition",
            sentence="A feature from 0 to 1 beside one from 0 to 2000 makes the loss "
            "ill-conditioned, and standardising cures it",
            source=_SOURCE,
            reported="in expectation 2.1e7 against 1; asked for: half",
            effect="condition number of the Hessian, raw over standardised",
            measure=lambda run: _ratio(run, "two", "condition"),
            rule=Above(1e7, null=1.0),
            figures=("paths",),
            ratio=True,
        ),
        Claim(
            id="steps",
            sentence="Standardised, gradient descent needs millions of times fewer steps",
            source=_SOURCE,
            reported="by the formula 1.5e8 against about 4; asked for: as for the condition number",
            effect="steps until 1e−6 of the error is left, raw over standardised",
            measure=lambda run: _ratio(run, "two", "steps"),
            rule=Above(1e7, null=1.0),
            figures=("errors",),
            ratio=True,
        ),
        Claim(
            id="offset",
            sentence="The same scale is not enough: features that are not centred still slow it",
            source=_SOURCE,
            reported="condition number 28 in expectation: 194 steps against 4; asked for: half",
            effect="steps, each feature divided by its largest value over standardised",
            measure=lambda run: _ratio(run, "two", "steps", "range"),
            rule=Above(24.0, null=1.0),
            figures=("errors",),
            ratio=True,
        ),
        Claim(
            id="theory",
            sentence="From the worst start descent takes ln(10⁻⁶)/ln((κ − 1)/(κ + 1)) steps",
            source=_SOURCE,
            reported="a proof",
            effect="largest relative difference beyond rounding up to whole steps",
            measure=_off_theory,
            rule=Within(_ROUNDING),
            figures=("paths",),
        ),
        Claim(
            id="task-steps",
            sentence="Real inputs, too, take fewer steps where each of them is standardised",
            source=_SOURCE,
            reported="–; asked for: ten times fewer",
            effect="steps until 1e−6 of the error is left, raw over standardised",
            measure=lambda run: _ratio(run, "task", "steps"),
            rule=Above(10.0, null=1.0),
            figures=("errors",),
            ratio=True,
        ),
        Claim(
            id="raw",
            sentence="A network without batch norm gets further on standardised than on raw inputs",
            source="not in the papers",
            reported="–; asked for: 1%",
            effect="final test accuracy, each at its best rate, standardised minus raw",
            measure=lambda run: _gain(run, "raw"),
            rule=Above(0.01, null=0.0),
            figures=("accuracies",),
            percent=True,
        ),
        Claim(
            id="skewed",
            sentence="It gets further on standardised than on skewed inputs",
            source="not in the papers",
            reported="–; asked for: 1%",
            effect="final test accuracy, each at its best rate, standardised minus skewed",
            measure=lambda run: _gain(run, "skewed"),
            rule=Above(0.01, null=0.0),
            figures=("accuracies",),
            percent=True,
        ),
        Claim(
            id="batch-norm",
            sentence="With batch norm inside, the result depends less on the scaling",
            source="not in the papers",
            reported="–; asked for: 1% less",
            effect="best minus worst final accuracy over the scalings, without minus with",
            measure=_less_spread,
            rule=Above(0.01, null=0.0),
            figures=("accuracies",),
            percent=True,
        ),
    ],
)
