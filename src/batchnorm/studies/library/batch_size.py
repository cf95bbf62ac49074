"""Small batches: where batch norm's error goes, and what helps."""

from __future__ import annotations

from collections.abc import Callable

from batchnorm.records import Cell, Run
from batchnorm.report.charts.batch_size import against_batch_size
from batchnorm.report.spec import Axis, Chart
from batchnorm.studies.measures import last
from batchnorm.studies.settings import CellSettings
from batchnorm.studies.sizes import SizedSettings, check_sizes, sized_cells
from batchnorm.studies.study import Study
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

NORMS = ("batch", "group", "renorm", "frozen")
GHOSTS = {f"ghost{size}": size for size in (2, 4, 8, 16)}
"""Parts of the largest batch that are normalised by themselves."""

LINES = (*NORMS, "parts of the largest batch")

_GROUP = "arXiv 1803.08494"
_RENORM = "arXiv 1702.03275"
_HALF = 0.053
"""Half of the 10.6% that separate group from batch norm at batches of 2 in arXiv 1803.08494."""


class Settings(SizedSettings):
    """See docs/studies/batch-size.md; the built-in mlp has ReLUs unless told otherwise."""


def cells(settings: Settings) -> list[CellSettings]:
    largest = max(settings.sizes)
    ghosts = [name for name, size in GHOSTS.items() if size in settings.sizes and size < largest]
    return [
        cell
        for norms, sizes in ((NORMS, settings.sizes), (ghosts, (largest,)))
        for size in sizes
        for cell in sized_cells(settings, norms, size)
    ]


def _error(cell: Cell, part: str = "test") -> float:
    """Error at the end; that of guessing where the loss overflowed."""
    if cell.manifest["state"] == "diverged":
        return 1 - 1 / int(cell.manifest["task"]["outputs"])
    return 1 - last(cell, f"{part}/accuracy")


def _errors(run: Run, norm: str, pick: Callable[[list[int]], int]) -> dict[int, float]:
    """Final test errors by seed, at the smallest (``min``) or the largest (``max``) batch."""
    sizes = [int(cell.settings["batch_size"]) for cell in run.cells if cell.ended]
    if not sizes:
        return {}
    found = run.by_seed(norm=norm, batch_size=pick(sizes))
    return {seed: _error(cell) for seed, cell in found.items()}


def _difference(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    return {seed: one[seed] - other[seed] for seed in one if seed in other}


def _rise(run: Run, norm: str = "batch") -> dict[int, float]:
    """Error with the smallest batch minus error with the largest."""
    return _difference(_errors(run, norm, min), _errors(run, norm, max))


def _share_of_rise(run: Run, part: dict[int, float]) -> dict[int, float]:
    rise = _rise(run)
    for seed in part:
        if seed in rise and rise[seed] <= 0:
            raise CannotTellError(f"Batch norm's own error does not rise for seed {seed}")
    return {seed: part[seed] / rise[seed] for seed in part if seed in rise}


def _helps(run: Run, norm: str) -> dict[int, float]:
    """Of the rise with batch norm, what ``norm`` at the smallest batch takes away."""
    saved = _difference(_errors(run, "batch", min), _errors(run, norm, min))
    return _share_of_rise(run, saved)


def _ghosts(run: Run) -> dict[int, float]:
    """Of the rise with batch norm, what the smallest ghosts in the largest batch have."""
    ghosts = [g for g in GHOSTS if any(c.settings["norm"] == g for c in run.cells)]
    if not ghosts:
        return {}
    rise = _difference(_errors(run, ghosts[0], max), _errors(run, "batch", max))
    return _share_of_rise(run, rise)


def _place(cell: Cell) -> tuple[int, int]:
    norm = str(cell.settings["norm"])
    if norm in GHOSTS:
        return len(NORMS), GHOSTS[norm]
    return NORMS.index(norm), int(cell.settings["batch_size"])


def figures(run: Run) -> list[Chart]:
    return [
        against_batch_size(
            run,
            {
                "test set": _error,
                "training set": lambda cell: _error(cell, "train"),
            },
            _place,
            id="error",
            title="Final error against batch size",
            how="Every network saw the same number of examples. A flat line does not mind small "
            "batches; parts of the largest batch stand at the size of a part.",
            source=f"after {_GROUP}",
            y=Axis("error", percent=True),
        )
    ]


STUDY = Study(
    name="batch-size",
    question="How much does batch norm lose with small batches, is it the statistics that lose it, "
    "and do group norm, batch renormalization or fixed statistics avoid that?",
    source=f"{_GROUP}, {_RENORM}, arXiv 1705.08741",
    settings=Settings,
    scales={
        "quick": Settings(
            steps=96,
            every=24,
            lr=0.2,
            probes=("performance",),
            seeds=5,
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="resnet",
            optimizer="momentum",
            weight_decay=1e-4,
            steps=47_000,
            every=4_700,
            probes=("performance",),
            test_limit=10_000,
            seeds=3,
        ),
    },
    cells=cells,
    check=check_sizes,
    figures=figures,
    lines=LINES,
    claims=[
        Claim(
            id="batch-rises",
            sentence="With batch norm the error rises as batches get small",
            source=_GROUP,
            reported="error increases rapidly when the batch size becomes smaller, at 2 to 10.6% "
            "more than with group norm; asked for: half of that",
            effect="final test error, smallest batch minus largest",
            measure=_rise,
            rule=Above(_HALF, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="group-stable",
            sentence="With group norm it does not",
            source=_GROUP,
            reported="accuracy is stable in a wide range of batch sizes; asked for: a tenth of "
            "batch norm's rise",
            effect="rise with group norm as a share of the rise with batch norm",
            measure=lambda run: _share_of_rise(run, _rise(run, "group")),
            rule=Below(0.1, null=1.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="group-at-smallest",
            sentence="At the smallest batch group norm's error is below batch norm's",
            source=_GROUP,
            reported="10.6% lower at batches of 2; asked for: half of that",
            effect="final test error at the smallest batch, batch norm minus group norm",
            measure=lambda run: _difference(_errors(run, "batch", min), _errors(run, "group", min)),
            rule=Above(_HALF, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="statistics",
            sentence="It is the statistics: a large batch normalised in parts of two loses as much",
            source=f"{_GROUP}; the parts are arXiv 1705.08741's",
            reported="caused by inaccurate batch statistics estimation; asked for: half of the "
            "rise",
            effect="final test error at the largest batch, in parts of the smallest minus whole, "
            "as a share of the rise with batch norm",
            measure=_ghosts,
            rule=Above(0.5, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="renorm-helps",
            sentence="Batch renormalization loses less at the smallest batch",
            source=_RENORM,
            reported="substantially better than batch norm with small batches; asked for: half of "
            "the rise taken away",
            effect="final test error at the smallest batch, batch norm minus renormalization, as "
            "a share of the rise with batch norm",
            measure=lambda run: _helps(run, "renorm"),
            rule=Above(0.5, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="frozen-helps",
            sentence="So do statistics that are measured before training and then kept",
            source="not in the papers",
            reported="–; asked for: half of the rise taken away",
            effect="as above, with frozen statistics",
            measure=lambda run: _helps(run, "frozen"),
            rule=Above(0.5, null=0.0),
            figures=("error",),
            percent=True,
        ),
    ],
)
