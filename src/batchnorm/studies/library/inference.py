"""[P1] Algorithm 2 and what takes its place: what to normalise by once training is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from batchnorm.records import Cell, Run
from batchnorm.report.grid import across
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.measures import early_mean, last
from batchnorm.studies.settings import CellSettings, PositiveRate
from batchnorm.studies.study import Study, TrainingStudySettings, check_data_given, training_cells
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

if TYPE_CHECKING:
    from batchnorm.probes import Layer, Probe

MOMENTA = (0.1, 0.01, 0.001, None)
SIZES = (1, 2, 8, 32, 256)
"""Examples of a test batch."""
SMALL, LARGE = 2, 256
FEW, SOME = 8, 32
"""Sizes at which adapting to shifted data is judged: with little, and with more to go by."""
PRIOR = 16
"""N: how many examples the running statistics count for in a mixture."""
SHIFTED = ("noise", "contrast", "brightness", "blur")
_EARLY = 0.1
"""Share of the run that counts as its beginning."""

LINES = {
    "running-0.1": "momentum 0.1",
    "running-0.01": "momentum 0.01",
    "running-0.001": "momentum 0.001",
    "running-cumulative": "mean of all batches",
    "algorithm2": "Algorithm 2",
    "batch": "test batch",
    "mixture": "mixture",
    "adapted": "mixed afterwards",
}
_PLACE = {name: place for place, name in enumerate(LINES)}

_SHIFT = "arXiv 2006.16971"


class Settings(TrainingStudySettings):
    """See docs/studies/inference.md."""

    lr: PositiveRate = 0.1
    """Learning rate."""


def cells(settings: Settings) -> list[CellSettings]:
    return training_cells(settings, norm=["batch"], lr=[settings.lr])


def _measured(steps: int, every: int | None) -> set[int]:
    """Ten times as often in the beginning."""
    often = every or max(1, steps // 40)
    return {*range(0, steps, often), *range(0, int(_EARLY * steps) + 1, max(1, often // 10)), steps}


def run(cell: CellSettings, at: CellRun) -> None:
    import torch

    from batchnorm.probes import Population, TestBatches
    from batchnorm.studies.corruptions import corrupted
    from batchnorm.studies.training import task_of, train

    task = task_of(cell)
    # Their own order may be by class, and a batch of one class is no batch of the test set.
    generator = torch.Generator().manual_seed(0)
    train_x, test_x, test_y = (
        part[torch.randperm(len(part), generator=generator.manual_seed(0))[: cell.test_limit]]
        for part in (task.train.x, task.test.x, task.test.y)
    )
    size = min(cell.batch_size or len(train_x), len(train_x))
    batches = [batch for batch in train_x.split(size) if len(batch) == size]

    def probes(settings: CellSettings, layers: list[Layer]) -> list[Probe]:
        measured = _measured(settings.steps, settings.every)
        sets = {"clean": test_x} | corrupted(test_x)
        return [
            Population(MOMENTA, measured, batches, (test_x, test_y), task.loss),
            TestBatches(
                {name: (x, test_y) for name, x in sets.items()},
                {settings.steps},
                SIZES,
                (FEW, SOME),
                task.loss,
                prior=PRIOR,
            ),
        ]

    train(cell, at, extra=probes)


def _better(run: Run, one: str, other: str) -> dict[int, float]:
    """Final test accuracy with the statistics ``one`` minus ``other``."""
    return {
        seed: last(cell, f"{one}/accuracy") - last(cell, f"{other}/accuracy")
        for seed, cell in run.by_seed(norm="batch").items()
    }


def _apart(run: Run, one: str, other: str) -> dict[int, float]:
    return {seed: abs(effect) for seed, effect in _better(run, one, other).items()}


def _earlier(run: Run) -> dict[int, float]:
    """Mean accuracy in the beginning, Algorithm 2 minus the running average."""
    return {
        seed: early_mean(cell, "algorithm2/accuracy", _EARLY)
        - early_mean(cell, "running-0.1/accuracy", _EARLY)
        for seed, cell in run.by_seed(norm="batch").items()
    }


def _shifted_error(cell: Cell, way: str) -> float:
    """Mean error over the corruptions."""
    sets = [name for name in SHIFTED if cell.series(f"{name}/{way}/accuracy")]
    if not sets:
        raise CannotTellError(f"Cell {cell.folder.name} has no accuracy on shifted data by {way}")
    return float(np.mean([1 - last(cell, f"{name}/{way}/accuracy") for name in sets]))


def _recovered(run: Run) -> dict[int, float]:
    """Of the errors that the shift adds, what the statistics of a test batch take away."""
    found = {}
    for seed, cell in run.by_seed(norm="batch").items():
        shifted = _shifted_error(cell, "running")
        added = shifted - (1 - last(cell, "clean/running/accuracy"))
        if added <= 0:
            raise CannotTellError(f"The corruptions cost nothing for seed {seed}")
        found[seed] = (shifted - _shifted_error(cell, f"batch-{SOME}")) / added
    return found


def _afterwards(run: Run) -> dict[int, float]:
    """Error on shifted data of a mixture made afterwards, minus that of one layer by layer."""
    return {
        seed: _shifted_error(cell, f"adapted-{FEW}") - _shifted_error(cell, f"mixture-{FEW}")
        for seed, cell in run.by_seed(norm="batch").items()
    }


def _mixed(run: Run) -> dict[int, float]:
    """Error on shifted data of the better of both sources alone, minus of their mixture."""
    return {
        seed: min(_shifted_error(cell, "running"), _shifted_error(cell, f"batch-{FEW}"))
        - _shifted_error(cell, f"mixture-{FEW}")
        for seed, cell in run.by_seed(norm="batch").items()
    }


def _line(name: str, seeds: list[dict[int, float]]) -> list[Line]:
    series = across([{x: value for x, value in seed.items() if x > 0} for seed in seeds])
    if series is None:
        return []
    return [Line(_PLACE[name], series.x, series.y, series.low, series.high)]


def _over_time(run: Run) -> list[Panel]:
    lines = [
        line
        for name in LINES
        for line in _line(name, [cell.series(f"{name}/accuracy") for cell in run.cells])
    ]
    return [Panel("", lines, domain=fit(lines))] if lines else []


def _points(cell: Cell, test: str, way: str) -> dict[int, float]:
    """Errors by the size of the test batch; what does not know it has the same everywhere."""
    table = {}
    for size in SIZES:
        name = "running" if way == "running-0.1" else f"{way}-{size}"
        if series := cell.series(f"{test}/{name}/accuracy"):
            table[size] = 1 - series[max(series)]
    return table


def _by_size(run: Run) -> list[Panel]:
    panels = []
    for test in ("clean", *SHIFTED):
        lines = [
            line
            for way in ("running-0.1", "batch", "mixture", "adapted")
            for line in _line(way, [_points(cell, test, way) for cell in run.cells])
        ]
        if lines:
            panels.append(Panel(test, lines, domain=fit(lines)))
    return panels


def figures(run: Run) -> list[Chart]:
    band = "smallest to largest over the seeds"
    return [
        Chart(
            id="population",
            title="One network with several statistics of the population",
            how="Accuracy on the test set. The network is the same in all lines; what it "
            "normalises by when it is evaluated is not.",
            source=f"{P1}, Algorithm 2",
            x=Axis("step", type="log"),
            y=Axis("test accuracy", percent=True),
            panels=_over_time(run),
            band=band,
        ),
        Chart(
            id="test-batches",
            title="Error at the end by the size of the test batch",
            how="What normalises by the test batch needs it to be large, unless the data have "
            "shifted and nothing else knows of that. Corruptions are those of the study's page.",
            source=f"after {_SHIFT}",
            x=Axis("examples of a test batch", type="log", ticks=[float(size) for size in SIZES]),
            y=Axis("test error", percent=True),
            panels=_by_size(run),
            band=band,
            dots=True,
            columns=2,
        ),
    ]


STUDY = Study(
    name="inference",
    question="What should evaluation normalise by: running averages, Algorithm 2, or the test "
    "batch; and what where the test data have shifted?",
    source=f"[P1] Algorithm 2, {_SHIFT}",
    settings=Settings,
    scales={
        "quick": Settings(
            model="cnn",
            batch_size=60,
            steps=400,
            every=20,
            probes=(),
            seeds=5,
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="resnet",
            optimizer="momentum",
            weight_decay=1e-4,
            batch_size=128,
            steps=15_000,
            every=500,
            probes=(),
            test_limit=10_000,
        ),
    },
    cells=cells,
    run=run,
    check=check_data_given,
    figures=figures,
    lines=tuple(LINES.values()),
    claims=[
        Claim(
            id="end",
            sentence="At the end the running average is as good as Algorithm 2",
            source="[P1] Algorithm 2",
            reported="moving averages follow the accuracy during training; asked for: within 1%",
            effect="distance of the final test accuracies, Algorithm 2 and momentum 0.1",
            measure=lambda run: _apart(run, "algorithm2", "running-0.1"),
            rule=Below(0.01),
            figures=("population",),
            percent=True,
        ),
        Claim(
            id="beginning",
            sentence="At the beginning of training it is worse",
            source="arXiv 2105.07576",
            reported="–; averages lag behind weights that move fast",
            effect="test accuracy, mean over the first tenth of the run, Algorithm 2 minus "
            "momentum 0.1",
            measure=_earlier,
            rule=Above(0.0),
            figures=("population",),
            percent=True,
        ),
        Claim(
            id="printed-pooled",
            sentence="The variance as Algorithm 2 prints it is as good as that of all values "
            "together",
            source="[P1] Algorithm 2, arXiv 2105.07576",
            reported="–; they differ by how the means of batches differ; asked for: within 1%",
            effect="distance of the final test accuracies",
            measure=lambda run: _apart(run, "algorithm2", "pooled"),
            rule=Below(0.01),
            percent=True,
        ),
        Claim(
            id="momentum",
            sentence="A momentum of 0.1 is better than one of 0.001",
            source="not in the papers",
            reported="–",
            effect="final test accuracy, momentum 0.1 minus 0.001",
            measure=lambda run: _better(run, "running-0.1", "running-0.001"),
            rule=Above(0.0),
            figures=("population",),
            percent=True,
            note="In short runs this is the start of the average: after t steps 0.999^t of it is "
            "left.",
        ),
        Claim(
            id="cumulative",
            sentence="It is better than the mean of all batches since the start (momentum None)",
            source="not in the papers",
            reported="–",
            effect="final test accuracy, momentum 0.1 minus the mean of all batches",
            measure=lambda run: _better(run, "running-0.1", "running-cumulative"),
            rule=Above(0.0),
            figures=("population",),
            percent=True,
        ),
        Claim(
            id="large-batches",
            sentence="Where the test batch itself is used, a large one is better than a small one",
            source="[P1] Algorithm 2",
            reported="–; statistics of the population are of all examples",
            effect=f"final test accuracy, batches of {LARGE} minus batches of {SMALL}",
            measure=lambda run: _better(run, f"clean/batch-{LARGE}", f"clean/batch-{SMALL}"),
            rule=Above(0.0),
            figures=("test-batches",),
            percent=True,
        ),
        Claim(
            id="single",
            sentence="One example at a time, the running average is better than the example's own "
            "statistics",
            source="[P1] Algorithm 2",
            reported="–",
            effect="final test accuracy, momentum 0.1 minus batches of 1",
            measure=lambda run: _better(run, "clean/running", "clean/batch-1"),
            rule=Above(0.0),
            figures=("test-batches",),
            percent=True,
        ),
        Claim(
            id="recovers",
            sentence="On shifted data the statistics of the test batch undo part of the harm",
            source=_SHIFT,
            reported="corrupted images are recognised better; asked for: a quarter of the errors "
            "that the shift adds",
            effect=f"share of the added errors that batches of {SOME} take away, corruptions "
            "together",
            measure=_recovered,
            rule=Above(0.25, null=0.0),
            figures=("test-batches",),
            percent=True,
        ),
        Claim(
            id="mixture",
            sentence="With few examples a mixture with the running average is better than either",
            source=_SHIFT,
            reported="μ = N/(N+n)·μ_s + n/(N+n)·μ_t is proposed for that",
            effect=f"mean error on shifted data, the better of both alone minus the mixture, "
            f"n = {FEW}, N = {PRIOR}",
            measure=_mixed,
            rule=Above(0.0),
            figures=("test-batches",),
            percent=True,
        ),
        Claim(
            id="layer-by-layer",
            sentence="The mixture has to be made layer by layer: statistics that are measured with "
            "the batch alone and mixed afterwards do not fit what the layers then see",
            source="not in the papers",
            reported="–",
            effect=f"mean error on shifted data, mixed afterwards minus layer by layer, n = {FEW}, "
            f"N = {PRIOR}",
            measure=_afterwards,
            rule=Above(0.0),
            figures=("test-batches",),
            percent=True,
        ),
    ],
)
