"""The noise of the batch's statistics as a regulariser."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from batchnorm.records import Cell, Run
from batchnorm.report.charts.batch_size import against_batch_size
from batchnorm.report.spec import Axis, Chart
from batchnorm.studies.callables import is_callable_name
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.measures import last
from batchnorm.studies.settings import CellSettings, SettingsError, Share
from batchnorm.studies.sizes import SizedSettings, check_sizes, sized_cells
from batchnorm.studies.study import Study
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

NORMS = ("batch", "renorm", "none")
GHOSTS = {f"ghost{size}": size for size in (4, 8, 16, 32)}
"""Parts of the largest batch that are normalised by themselves."""

DROPOUT = ("none", "batch")
"""Arms that the largest batch has with dropout too."""

LINES = (*NORMS, "parts of the largest batch", "none, dropout", "batch norm, dropout")

_PART = "ghost16"
"""The parts of which claims speak, a quarter of the largest batch at quick scale."""

_THEORY = "arXiv 1809.00846"
_P1 = "[P1] Section 3.4"
_BETTER = 0.005
"""Half of the 1% of test accuracy that [P1] Figure 1 has between the two networks at the end."""
_SMALLER = 1.1

Effects = dict[int, float]


class Settings(SizedSettings):
    """See docs/studies/regularize.md; the built-in mlp has ReLUs unless told otherwise."""

    dropout: Share | None = 0.5
    """Dropout rate of the arms that have it; built-in networks only."""


def cells(settings: Settings) -> list[CellSettings]:
    largest = max(settings.sizes)
    ghosts = [name for name, size in GHOSTS.items() if size < largest]
    found = [
        cell
        for norms, sizes in ((NORMS, settings.sizes), (ghosts, (largest,)))
        for size in sizes
        for cell in sized_cells(settings, norms, size, dropout=None)
    ]
    if settings.dropout and not is_callable_name(settings.model):
        found += sized_cells(settings, DROPOUT, largest)
    return [*found]


def check(settings: Settings) -> None:
    check_sizes(settings)
    if is_callable_name(settings.model) and "dropout" in settings.model_fields_set:
        raise SettingsError(
            f"dropout={settings.dropout}: model={settings.model!r} decides itself whether it has "
            "dropout. Leave it out."
        )


def run(cell: CellSettings, at: CellRun) -> None:
    from batchnorm.probes.gamma import Gamma
    from batchnorm.studies.training import train

    train(cell, at, extra=lambda settings, layers: [Gamma(settings.every or settings.steps)])


def _gap(cell: Cell) -> float:
    """Test loss minus training loss at the end."""
    return last(cell, "test/loss") - last(cell, "train/loss")


def _error(cell: Cell, part: str = "test") -> float:
    return 1 - last(cell, f"{part}/accuracy")


def _scale(cell: Cell) -> float:
    """Root mean square of γ at the end over the layers that have one."""
    found = [cell.series("gamma/rms", layer) for layer in cell.layers]
    squares = [series[max(series)] ** 2 for series in found if series]
    if not squares:
        raise CannotTellError(f"Cell {cell.folder.name} has no γ")
    return float(np.sqrt(np.mean(squares)))


def _of(run: Run, norm: str, pick: Callable[[list[int]], int]) -> dict[int, Cell]:
    """The cells of a norm by seed, at the smallest (``min``) or the largest (``max``) batch."""
    sizes = [int(cell.settings["batch_size"]) for cell in run.cells]
    return run.by_seed(norm=norm, batch_size=pick(sizes), dropout=None) if sizes else {}


def _dropout_saves(run: Run, norm: str) -> Effects:
    """Test error at the largest batch without dropout minus with it."""
    rates = {cell.settings["dropout"] for cell in run.cells if cell.settings.get("dropout")}
    if not rates:
        raise CannotTellError("No network of the run has dropout")
    with_ = run.by_seed(norm=norm, dropout=max(rates))
    return _compare(_of(run, norm, max), with_, _error, _minus)


def _compare(
    one: dict[int, Cell],
    other: dict[int, Cell],
    measure: Callable[[Cell], float],
    by: Callable[[float, float], float],
) -> Effects:
    return {s: by(measure(one[s]), measure(other[s])) for s in one if s in other}


def _ratio(one: float, other: float) -> float:
    if one <= 0 or other <= 0:
        raise CannotTellError("A network is not worse on the test set than in training")
    return one / other


def _minus(one: float, other: float) -> float:
    return one - other


def _dose(run: Run) -> Effects:
    """Slope of ln gap over ln size, over all parts of the largest batch and the whole of it."""
    arms = [_of(run, norm, max) for norm in ("batch", *GHOSTS)]
    arms = [cells for cells in arms if cells]
    if len(arms) < 2:
        return {}
    found = {}
    for seed in sorted(set.intersection(*map(set, arms))):
        gaps = [_gap(cells[seed]) for cells in arms]
        if min(gaps) <= 0:
            raise CannotTellError("A network is not worse on the test set than in training")
        sizes = [_place(cells[seed])[1] for cells in arms]
        found[seed] = float(np.polyfit(np.log(sizes), np.log(gaps), 1)[0])
    return found


def _place(cell: Cell) -> tuple[int, int]:
    norm = str(cell.settings["norm"])
    if norm in GHOSTS:
        return len(NORMS), GHOSTS[norm]
    if cell.settings.get("dropout"):
        return len(NORMS) + 1 + DROPOUT.index(norm), int(cell.settings["batch_size"])
    return NORMS.index(norm), int(cell.settings["batch_size"])


def figures(run: Run) -> list[Chart]:
    how = (
        "Every network saw the same number of examples; parts of the largest batch stand at the "
        "size of a part. "
    )
    return [
        against_batch_size(
            run,
            {"test loss − training loss": _gap},
            _place,
            id="gap",
            title="Generalisation gap",
            how=how + "What regularises makes the gap smaller.",
            source=f"{_P1}; {_THEORY}",
            y=Axis("gap of the loss"),
        ),
        against_batch_size(
            run,
            {"test set": _error, "training set": lambda cell: _error(cell, "train")},
            _place,
            id="error",
            title="Final error",
            how=how + "A smaller gap is worth something where the error on the test set falls too.",
            source=_P1,
            y=Axis("error", percent=True),
        ),
        against_batch_size(
            run,
            {"": lambda cell: _scale(cell) if cell.settings["norm"] != "none" else np.nan},
            _place,
            id="scale",
            title="Size of γ",
            how="Root mean square of γ over all layers at the end; it starts at 1.",
            source=_THEORY,
            y=Axis("γ"),
        ),
    ]


STUDY = Study(
    name="regularize",
    question="Does the noise of a batch's statistics regularise, as an example is seen with others "
    "of its batch?",
    source=f"{_P1}; {_THEORY}; arXiv 1705.08741",
    settings=Settings,
    scales={
        "quick": Settings(
            train_limit=200,
            sizes=(4, 16, 64),
            steps=100,
            every=25,
            lr=0.4,
            probes=("performance",),
            seeds=8,
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="resnet",
            optimizer="momentum",
            sizes=(4, 8, 16, 32, 64),
            steps=23_500,
            every=2_350,
            probes=("performance",),
            test_limit=10_000,
            seeds=5,
        ),
    },
    cells=cells,
    run=run,
    check=check,
    figures=figures,
    lines=LINES,
    claims=[
        Claim(
            id="batch-norm-regularizes",
            sentence="Batch norm makes the generalisation gap smaller",
            source=_P1,
            reported="regularizes the model; asked for: 1.1 times smaller",
            effect="test loss minus training loss at the largest batch, none over batch norm",
            measure=lambda run: _compare(
                _of(run, "none", max), _of(run, "batch", max), _gap, _ratio
            ),
            rule=Above(_SMALLER, null=1.0),
            ratio=True,
            figures=("gap",),
        ),
        Claim(
            id="noise-gap",
            sentence="It is the noise: normalised in parts of 16, a large batch leaves a smaller "
            "gap than whole",
            source="arXiv 1705.08741, 1809.00846",
            reported="a significant decrease of the gap; asked for: 1.1 times smaller",
            effect="test loss minus training loss at the largest batch, whole over parts",
            measure=lambda run: _compare(
                _of(run, "batch", max), _of(run, _PART, max), _gap, _ratio
            ),
            rule=Above(_SMALLER, null=1.0),
            ratio=True,
            figures=("gap",),
        ),
        Claim(
            id="noise-error",
            sentence="And a smaller error on the test set",
            source="arXiv 1705.08741",
            reported="better generalisation; asked for: 0.5%",
            effect="final test error at the largest batch, whole minus parts of 16",
            measure=lambda run: _compare(
                _of(run, "batch", max), _of(run, _PART, max), _error, _minus
            ),
            rule=Above(_BETTER, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="dose",
            sentence="The smaller the parts, the smaller the gap",
            source=_THEORY,
            reported="a regularisation that falls with the batch size; no size of the effect",
            effect="slope of ln gap against ln size over parts of 4, 8, 16, 32 and the whole; a "
            "gap in proportion to the size has 1",
            measure=_dose,
            rule=Above(0.0),
            figures=("gap",),
        ),
        Claim(
            id="small-gap",
            sentence="At the smallest batch the gap is smaller than with batch renormalization, "
            "which takes the noise away",
            source=f"{_THEORY}, 1702.03275",
            reported="batch norm is population normalisation and a regularisation that falls with "
            "the batch size; asked for: 1.1 times smaller",
            effect="test loss minus training loss at the smallest batch, renormalization over "
            "batch norm",
            measure=lambda run: _compare(
                _of(run, "renorm", min), _of(run, "batch", min), _gap, _ratio
            ),
            rule=Above(_SMALLER, null=1.0),
            ratio=True,
            figures=("gap",),
        ),
        Claim(
            id="small-error",
            sentence="And so is the error on the test set",
            source=f"{_THEORY}, 1702.03275",
            reported="as above; asked for: 0.5%",
            effect="final test error at the smallest batch, renormalization minus batch norm",
            measure=lambda run: _compare(
                _of(run, "renorm", min), _of(run, "batch", min), _error, _minus
            ),
            rule=Above(_BETTER, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="scale-decay",
            sentence="The noise acts as a decay of γ",
            source=_THEORY,
            reported="regularisation by decay of γ; no size",
            effect="root mean square of γ at the end, parts of 16 over the whole largest batch",
            measure=lambda run: _compare(
                _of(run, _PART, max), _of(run, "batch", max), _scale, _ratio
            ),
            rule=Below(1.0),
            ratio=True,
            figures=("scale",),
        ),
        Claim(
            id="dropout-without",
            sentence="Without batch norm dropout lowers the error",
            source=_P1,
            reported="typically used to reduce overfitting; asked for: 0.5%",
            effect="final test error without any norm, without dropout minus with it",
            measure=lambda run: _dropout_saves(run, "none"),
            rule=Above(_BETTER, null=0.0),
            figures=("error",),
            percent=True,
        ),
        Claim(
            id="dropout-removed",
            sentence="With batch norm dropout can be left out",
            source=f"{_P1}, 4.2.1",
            reported="removed; allowed for: 0.5% of error",
            effect="final test error with batch norm, without dropout minus with it",
            measure=lambda run: _dropout_saves(run, "batch"),
            rule=Below(_BETTER),
            figures=("error",),
            percent=True,
        ),
    ],
)
