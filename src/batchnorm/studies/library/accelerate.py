"""[P1] Section 4.2: higher learning rates and the other changes that batch norm allows."""

from __future__ import annotations

from statistics import fmean

from batchnorm.records import Cell, Run
from batchnorm.report.charts.arms import best_accuracies, rising_accuracies
from batchnorm.report.charts.sentences import sentence
from batchnorm.report.papers import P1
from batchnorm.report.spec import Chart
from batchnorm.report.words import number
from batchnorm.studies.measures import last
from batchnorm.studies.modifications import ARMS, AccelerateSettings, arm_cells
from batchnorm.studies.study import Study, check_data_given
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

GROUPS = {
    "learning rates": ("none", "batch", "x5", "x30", "none-x5"),
    "sigmoid": ("none", "batch", "x5-sigmoid", "none-sigmoid"),
    "learning rate and network, one change each": (
        *("none", "batch", "rate", "decay", "dropout", "lrn"),
    ),
    "penalty and data, one change each": ("none", "batch", "l2", "shuffle", "distortion"),
}
_LEARNS = 0.05
"""Accuracy above guessing below which the network without batch norm sets no mark to reach."""

_TABLE = "[P1] Section 4.2.2, Figure 3"
_LIST = "[P1] Section 4.2.1"


def _together(run: Run, *arms: str) -> dict[int, list[Cell]]:
    """The cells of several arms, for the seeds that have all of them."""
    found = [run.by_seed(arm=arm) for arm in arms]
    return {s: [of[s] for of in found] for s in found[0] if all(s in of for of in found)}


def _best(cell: Cell) -> float:
    course = cell.series("test/accuracy")
    if not course:
        raise CannotTellError(f"Cell {cell.folder.name} has no test accuracy")
    return max(course.values())


def _learned(cell: Cell) -> float:
    """Best accuracy above guessing."""
    return _best(cell) - 1 / int(cell.manifest["task"]["outputs"])


def _reached(cell: Cell, mark: float) -> int | None:
    """The first measured step with this accuracy."""
    course = cell.series("test/accuracy")
    return min((step for step, value in course.items() if value >= mark), default=None)


def _speed(run: Run, arm: str, than: str) -> dict[int, float]:
    """Steps of ``than`` over steps of ``arm``, to the best accuracy of the plain network.

    An arm that never gets there counts as if it did at the end of the run: too kind to it.
    """
    found = {}
    for seed, (plain, one, other) in _together(run, "none", arm, than).items():
        if _learned(plain) < _LEARNS:
            raise CannotTellError(f"The network without batch norm does not learn for seed {seed}")
        steps = [_reached(cell, _best(plain)) for cell in (one, other)]
        if steps == [None, None]:
            raise CannotTellError(f"Neither network reaches the mark for seed {seed}")
        end = int(plain.settings["steps"])
        mine, theirs = (end if step is None else max(step, 1) for step in steps)
        found[seed] = theirs / mine
    return found


def _higher(run: Run, arm: str, than: str) -> dict[int, float]:
    return {s: _best(one) - _best(other) for s, (one, other) in _together(run, arm, than).items()}


def _fails(run: Run) -> dict[int, float]:
    """What the plain network has at the end at ×5, of what it learned at its own rate."""
    found = {}
    for seed, (plain, fast) in _together(run, "none", "none-x5").items():
        if _learned(plain) < _LEARNS:
            raise CannotTellError(f"It does not learn at its own rate for seed {seed}")
        lost = fast.manifest["state"] == "diverged"
        guessing = 1 / int(fast.manifest["task"]["outputs"])
        kept = 0.0 if lost else last(fast, "test/accuracy") - guessing
        found[seed] = kept / _learned(plain)
    return found


def _of(run: Run, arm: str, of: str) -> dict[int, float]:
    """What an arm learned, as a share of what another one did."""
    found = {}
    for seed, (one, other) in _together(run, arm, of).items():
        if _learned(other) < _LEARNS:
            raise CannotTellError(f"The network compared with does not learn for seed {seed}")
        found[seed] = _learned(one) / _learned(other)
    return found


def _finding(run: Run) -> str:
    """Steps to the best of the plain network, of each arm whose every seed gets there."""
    parts = []
    for arm, (_, short) in ARMS.items():
        steps = [_reached(one, _best(plain)) for plain, one in _measured(run, "none", arm)]
        if steps and None not in steps:
            parts.append(f"{number(fmean(step for step in steps if step is not None))} ({short})")
    start = "Steps to the best accuracy of the network without normalization, mean of the seeds:"
    return sentence(start, parts)


def _measured(run: Run, *arms: str) -> list[list[Cell]]:
    found = _together(run, *arms).values()
    return [each for each in found if all(cell.series("test/accuracy") for cell in each)]


def figures(run: Run) -> list[Chart]:
    arms = list(ARMS)
    axis = [short for _, short in ARMS.values()]
    return [
        rising_accuracies(run, arms, GROUPS, f"{P1}, Figure 2", _finding(run)),
        best_accuracies(run, arms, axis, f"{P1}, Figure 3"),
    ]


def _faster(arm: str, sentence: str) -> Claim:
    """One modification of the list that shall make training faster."""
    return Claim(
        id=f"only-{arm}",
        sentence=sentence,
        source=_LIST,
        reported="not by itself; all together are 6.3 times faster than batch norm alone",
        effect="steps to the best accuracy of the network without batch norm: batch norm alone "
        "over batch norm with this one change",
        measure=lambda run: _speed(run, arm, "batch"),
        rule=Above(1.0),
        ratio=True,
        figures=("accuracy",),
    )


def _better(arm: str, sentence: str) -> Claim:
    """One modification of the list that shall make the network better."""
    return Claim(
        id=f"only-{arm}",
        sentence=sentence,
        source=_LIST,
        reported="not by itself; all together end 0.3 points above batch norm alone",
        effect="best test accuracy, batch norm with this one change minus batch norm alone",
        measure=lambda run: _higher(run, arm, "batch"),
        rule=Above(0.0),
        percent=True,
        figures=("best",),
        full_only="one test example in 300 is as much as such a change can be expected to do",
    )


STUDY = Study(
    name="accelerate",
    question="How much faster does a network with batch norm train at higher learning rates, "
    "and with the other changes that the paper makes beside it?",
    source="[P1] Section 4.2, Figures 2 and 3",
    settings=AccelerateSettings,
    scales={
        "quick": AccelerateSettings(
            model="cnn",
            init_scale=1.4142135623730951,
            optimizer="momentum",
            lr=0.1,
            batch_size=60,
            steps=220,
            every=10,
            weight_decay=5e-4,
            shuffle="once",
            distortion=0.4,
            probes=("performance",),
            test_limit=300,
        ),
        "full": AccelerateSettings(
            task="cifar10",
            scaling="standardize",
            model="vgg",
            init_scale=1.4142135623730951,
            optimizer="momentum",
            batch_size=64,
            steps=30_000,
            every=250,
            weight_decay=5e-4,
            shuffle="once",
            distortion=0.4,
            probes=("performance",),
            test_limit=10_000,
        ),
    },
    cells=arm_cells,
    check=check_data_given,
    figures=figures,
    lines=tuple(legend for legend, _ in ARMS.values()),
    claims=[
        Claim(
            id="same-rate",
            sentence="At the same learning rate batch norm gets as far in fewer steps",
            source=_TABLE,
            reported="72.2% after 13.3 million steps against 31.0: 2.33 times faster",
            effect="steps to the best accuracy of the network without batch norm: without over "
            "with",
            measure=lambda run: _speed(run, "batch", "none"),
            rule=Above(31.0 / 13.3, null=1.0),
            ratio=True,
            figures=("accuracy",),
        ),
        Claim(
            id="x5",
            sentence="With all changes and five times the rate it gets there in far fewer",
            source=_TABLE,
            reported="after 2.1 million steps against 31.0: 14.8 times faster",
            effect="steps to the same accuracy: without batch norm over with all changes at ×5",
            measure=lambda run: _speed(run, "x5", "none"),
            rule=Above(31.0 / 2.1, null=1.0),
            ratio=True,
            figures=("accuracy",),
        ),
        Claim(
            id="all-changes",
            sentence="The changes make batch norm itself faster",
            source=_TABLE,
            reported="after 2.1 million steps against 13.3: 6.33 times faster",
            effect="steps to the same accuracy: batch norm alone over with all changes at ×5",
            measure=lambda run: _speed(run, "x5", "batch"),
            rule=Above(13.3 / 2.1, null=1.0),
            ratio=True,
            figures=("accuracy",),
        ),
        Claim(
            id="x30-slower",
            sentence="At thirty times the rate it is slower at first than at five times",
            source=_TABLE,
            reported="after 2.7 million steps against 2.1: 1.29 times slower",
            effect="steps to the same accuracy: at ×30 over at ×5",
            measure=lambda run: _speed(run, "x5", "x30"),
            rule=Above(2.7 / 2.1, null=1.0),
            ratio=True,
            figures=("accuracy",),
        ),
        Claim(
            id="x30-best",
            sentence="At thirty times the rate it ends above five times",
            source=_TABLE,
            reported="74.8% against 73.0%; asked for: half of the difference",
            effect="best test accuracy, ×30 minus ×5",
            measure=lambda run: _higher(run, "x30", "x5"),
            rule=Above(0.009, null=0.0),
            percent=True,
            figures=("accuracy", "best"),
        ),
        Claim(
            id="x30-above-none",
            sentence="At thirty times the rate it ends above the network without batch norm",
            source=_TABLE,
            reported="74.8% against 72.2%; asked for: half of the difference",
            effect="best test accuracy, ×30 minus none",
            measure=lambda run: _higher(run, "x30", "none"),
            rule=Above(0.013, null=0.0),
            percent=True,
            figures=("best",),
        ),
        Claim(
            id="x5-above-none",
            sentence="So it does at five times",
            source=_TABLE,
            reported="73.0% against 72.2%; asked for: half of the difference",
            effect="best test accuracy, ×5 minus none",
            measure=lambda run: _higher(run, "x5", "none"),
            rule=Above(0.004, null=0.0),
            percent=True,
            figures=("best",),
        ),
        Claim(
            id="none-x5",
            sentence="Without batch norm five times the rate cannot be trained with",
            source="[P1] Section 4.2.2",
            reported="parameters overflow; asked for: a tenth of what it learns at its own rate",
            effect="final test accuracy above guessing at ×5 over the best at ×1; none if the "
            "loss overflowed",
            measure=_fails,
            rule=Below(0.1, null=1.0),
            percent=True,
            figures=("accuracy",),
        ),
        Claim(
            id="sigmoid",
            sentence="With batch norm a network of sigmoids learns",
            source=_TABLE,
            reported="69.8%, chance being 0.1%; asked for: half of what the baseline learns",
            effect="best test accuracy above guessing, sigmoids with all changes at ×5 over the "
            "baseline",
            measure=lambda run: _of(run, "x5-sigmoid", "none"),
            rule=Above(0.5, null=0.0),
            percent=True,
            figures=("accuracy", "best"),
        ),
        Claim(
            id="sigmoid-none",
            sentence="Without batch norm a network of sigmoids stays at guessing",
            source="[P1] Section 4.2.2",
            reported="never better than chance; asked for: a tenth of what it learns with",
            effect="best test accuracy above guessing, sigmoids without over with batch norm",
            measure=lambda run: _of(run, "none-sigmoid", "x5-sigmoid"),
            rule=Below(0.1, null=1.0),
            percent=True,
            figures=("accuracy", "best"),
        ),
        _faster("rate", "A higher learning rate alone makes it faster"),
        _faster("dropout", "Removing dropout alone makes it faster"),
        _faster("decay", "A faster decay of the learning rate alone makes it faster"),
        _faster("lrn", "Removing local response normalization alone makes it faster"),
        _faster("distortion", "Less photometric distortion alone makes it faster"),
        _better("l2", "A fifth of the ℓ2 penalty alone makes it better"),
        _better("shuffle", "Shuffling each epoch alone makes it better"),
    ],
)
