"""Averages of weights and accumulated gradients: what batch norm makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import TYPE_CHECKING

from batchnorm.records import Run
from batchnorm.report.charts import performance
from batchnorm.report.grid import Grid, across
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.measures import last, pairs
from batchnorm.studies.settings import CellSettings, PositiveRate, SettingsError
from batchnorm.studies.study import Study, TrainingStudySettings, check_data_given, training_cells
from batchnorm.verdicts import Above, Claim, Within

if TYPE_CHECKING:
    from batchnorm.probes import Layer, Probe

PARTS = 8
"""Examples of a part over which gradients are accumulated."""
_GHOST = f"ghost{PARTS}"
_DECAY = 0.99

_ROUNDING = 1e-12
"""Relative, float64: two orders of the same sums, each term rounded at 1e-16."""

# The first two are the arms, as the chart of accuracies draws them.
LINES = {
    "batch": "whole batches",
    _GHOST: f"accumulated over parts of {PARTS}",
    "recompute": "recomputed statistics",
    "average": "averaged statistics",
    "copy": "copied statistics",
    "last": "last network, recomputed",
}
_PLACE = {name: place for place, name in enumerate(LINES)}

_SWA = "arXiv 1803.05407"
_GHOSTS = "arXiv 1705.08741"


class Settings(TrainingStudySettings):
    """See docs/studies/averaging.md."""

    lr: PositiveRate = 0.1
    """Learning rate."""


def cells(settings: Settings) -> list[CellSettings]:
    return training_cells(settings, norm=["batch", _GHOST], lr=[settings.lr])


def check(settings: Settings) -> None:
    """See that batches have parts, and that there are data."""
    check_data_given(settings)
    size = settings.batch_size
    if size is None or size % PARTS or size <= PARTS:
        raise SettingsError(
            f"batch_size={size}: gradients are accumulated over parts of {PARTS}. "
            f"Give a multiple of {PARTS}, at least {2 * PARTS}."
        )


def _snapshots(steps: int, epoch: int) -> set[int]:
    """Once an epoch over the second half of the run, the end among them."""
    return set(range(steps, steps // 2, -epoch))


def run(cell: CellSettings, at: CellRun) -> None:
    import torch

    from batchnorm.probes import Accumulation, Averages
    from batchnorm.studies.training import task_of, train

    task = task_of(cell)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(task.train), generator=generator)[: cell.test_limit]
    test = task.test.subset(cell.test_limit, seed=1)
    size = cell.batch_size or len(task.train)
    batches = [b for b in task.train.x[order].split(min(size, len(order))) if len(b) > 1]

    def probes(settings: CellSettings, layers: list[Layer]) -> list[Probe]:
        if settings.norm != "batch":
            return []
        steps = settings.steps
        every = settings.every or max(1, steps // 40)
        snapshots = _snapshots(steps, max(1, len(task.train) // size))
        return [
            Averages(
                _DECAY,
                snapshots,
                {*range(every, steps, every), steps},
                batches,
                (test.x, test.y),
                task.loss,
            ),
            Accumulation(PARTS, {0, steps // 2, steps}),
        ]

    train(cell, at, extra=probes)


def _more_loss(run: Run, one: str, other: str) -> dict[int, float]:
    """Final test loss with one average and its statistics over that with another."""
    return {
        seed: last(cell, f"{one}/loss") / last(cell, f"{other}/loss")
        for seed, cell in run.by_seed(norm="batch").items()
    }


def _more_on_the_way(run: Run, one: str, other: str) -> dict[int, float]:
    """The same over the whole run: the geometric mean of the ratios at all measurements."""
    found = {}
    for seed, cell in run.by_seed(norm="batch").items():
        above, below = (cell.series(f"{name}/loss") for name in (one, other))
        if ratios := [math.log(above[step] / below[step]) for step in above if step in below]:
            found[seed] = math.exp(fmean(ratios))
    return found


def _gradients(run: Run, what: str, pick: Callable[[Iterable[float]], float]) -> dict[int, float]:
    """The largest or the smallest distance of a gradient from the accumulated one."""
    return {
        seed: pick(series.values())
        for seed, cell in run.by_seed(norm="batch").items()
        if (series := cell.series(f"accumulation/{what}"))
    }


def _lost(run: Run) -> dict[int, float]:
    """Final test accuracy with whole batches minus accumulated."""
    return {
        seed: last(whole, "test/accuracy") - last(parts, "test/accuracy")
        for seed, (whole, parts) in pairs(run, ("batch", _GHOST)).items()
    }


def _losses(run: Run, average: str) -> list[Line]:
    sources = {name: f"{average}/{name}" for name in ("recompute", "average", "copy")}
    lines = []
    for name, source in ({"last": "last/recompute"} | sources).items():
        series = across([cell.series(f"{source}/loss") for cell in run.cells])
        if series is not None:
            lines.append(Line(_PLACE[name], series.x, series.y, series.low, series.high))
    return lines


def figures(run: Run) -> list[Chart]:
    names = {
        "ema": f"moving average, decay {_DECAY}",
        "swa": "equal average, once an epoch over the second half",
    }
    drawn = {title: _losses(run, average) for average, title in names.items()}
    accuracy = performance.accuracy(Grid(run))
    return [
        Chart(
            id="averages",
            title="Averages of the weights by their statistics",
            how="Loss on the test set. The weights of an average are the same in its three lines; "
            "the statistics that its batch norms are given are not.",
            source=f"after {_SWA}",
            x=Axis("step"),
            y=Axis("test loss", type="log"),
            panels=[
                Panel(title, lines, domain=fit(lines, log=True))
                for title, lines in drawn.items()
                if lines
            ],
            band="smallest to largest over the seeds",
        ),
        accuracy,
    ]


STUDY = Study(
    name="averaging",
    question="Which statistics fit averaged weights, and is a gradient that was accumulated over "
    "parts of a batch that of the batch?",
    source=f"{_SWA}, {_GHOSTS}",
    settings=Settings,
    scales={
        "quick": Settings(
            model="cnn",
            batch_size=64,
            steps=400,
            every=20,
            probes=("performance",),
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
            probes=("performance",),
            test_limit=10_000,
        ),
    },
    cells=cells,
    run=run,
    check=check,
    figures=figures,
    lines=tuple(LINES.values()),
    claims=[
        Claim(
            id="ema-copy",
            sentence="For a moving average of the weights, the statistics of the network in "
            "training are worse than recomputed ones",
            source="not in the papers",
            reported="–; asked for: a tenth more loss",
            effect="final test loss, copied over recomputed",
            measure=lambda run: _more_loss(run, "ema/copy", "ema/recompute"),
            rule=Above(1.1, null=1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="ema-average",
            sentence="So are statistics that are averaged like the weights",
            source="not in the papers",
            reported="–; asked for: a tenth more loss",
            effect="final test loss, averaged over recomputed",
            measure=lambda run: _more_loss(run, "ema/average", "ema/recompute"),
            rule=Above(1.1, null=1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="ema-copy-average",
            sentence="Averaged ones are better than those of the network in training",
            source="not in the papers",
            reported="–",
            effect="final test loss, copied over averaged",
            measure=lambda run: _more_loss(run, "ema/copy", "ema/average"),
            rule=Above(1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="ema-copy-way",
            sentence="On the way there, while the weights move, those of the network in training "
            "are worse than recomputed ones",
            source="not in the papers",
            reported="–; asked for: a tenth more loss",
            effect="test loss, copied over recomputed, geometric mean over the run",
            measure=lambda run: _more_on_the_way(run, "ema/copy", "ema/recompute"),
            rule=Above(1.1, null=1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="ema-average-way",
            sentence="And so are averaged ones",
            source="not in the papers",
            reported="–; asked for: a tenth more loss",
            effect="test loss, averaged over recomputed, geometric mean over the run",
            measure=lambda run: _more_on_the_way(run, "ema/average", "ema/recompute"),
            rule=Above(1.1, null=1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="swa-copy",
            sentence="For an equal average, the statistics of the last network are worse than "
            "recomputed ones",
            source=_SWA,
            reported="statistics are recomputed for the average; asked for: a tenth more loss",
            effect="final test loss, copied over recomputed",
            measure=lambda run: _more_loss(run, "swa/copy", "swa/recompute"),
            rule=Above(1.1, null=1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="swa-average",
            sentence="So are statistics that are averaged like the weights",
            source=_SWA,
            reported="as above",
            effect="final test loss, averaged over recomputed",
            measure=lambda run: _more_loss(run, "swa/average", "swa/recompute"),
            rule=Above(1.1, null=1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="swa-gain",
            sentence="With recomputed statistics the equal average is better than the last network",
            source=_SWA,
            reported="averages generalise better",
            effect="final test loss, last network over average, both recomputed",
            measure=lambda run: _more_loss(run, "last/recompute", "swa/recompute"),
            rule=Above(1.0),
            figures=("averages",),
            ratio=True,
        ),
        Claim(
            id="accumulation-ghost",
            sentence="A gradient accumulated over parts is that of the batch normalised in parts "
            "(ghost batch norm)",
            source=f"follows from the definition in {_GHOSTS}",
            reported="–",
            effect="distance of the gradients, relative, largest over the run",
            measure=lambda run: _gradients(run, "ghost", max),
            rule=Within(_ROUNDING),
        ),
        Claim(
            id="accumulation-whole",
            sentence="It is not that of the batch normalised as one",
            source="follows from [P1] Algorithm 1",
            reported="–; asked for: a tenth of its length",
            effect="distance of the gradients, relative, smallest over the run",
            measure=lambda run: _gradients(run, "whole", min),
            rule=Above(0.1, null=0.0),
            percent=True,
        ),
        Claim(
            id="accumulation-still",
            sentence="It is the statistics: where they hold still, accumulating changes nothing",
            source="follows from [P1] Algorithm 2",
            reported="–",
            effect="distance of the gradients in evaluation mode, relative, largest over the run",
            measure=lambda run: _gradients(run, "still", max),
            rule=Within(_ROUNDING),
        ),
        Claim(
            id="accumulation-accuracy",
            sentence="Whole batches end at a higher accuracy than accumulated ones",
            source="not in the papers",
            reported="–",
            effect="final test accuracy, whole minus accumulated",
            measure=_lost,
            rule=Above(0.0),
            figures=("accuracy",),
            percent=True,
        ),
    ],
)
