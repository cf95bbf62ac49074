"""What a study is: a question, its claims, its cells, and how they are shown.

A study is one file in ``studies/library`` that ends in ``STUDY = Study(...)``. It is imported to
list, to judge and to draw, so it imports torch only inside the function that computes a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.records import Run
from batchnorm.report.spec import Chart
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.settings import (
    CellBase,
    CellSettings,
    SettingsError,
    StudySettings,
    TrainingSettings,
)
from batchnorm.verdicts import Claim, Verdict, judge

__all__ = ["Study", "TrainingStudySettings", "check_data_given", "train", "training_cells"]


class TrainingStudySettings(TrainingSettings, StudySettings):
    """Settings of a study that trains networks, the user's own among them."""


_DATA = {"mnist": ("MNIST", "ylecun/mnist"), "cifar10": ("CIFAR-10", "uoft-cs/cifar10")}


def check_data_given(settings: TrainingStudySettings) -> None:
    """See that a full scale, whose data are not part of this package, was given them.

    Raises:
        SettingsError: the task is still the name that stands for them.
    """
    if settings.task in _DATA:
        name, hub = _DATA[settings.task]
        raise SettingsError(
            f"task={settings.task!r}: the full scale needs {name} itself, which is not part of "
            f"this package. Give its folder (--task path/to/{settings.task}) or its name on the "
            f"hub (--task {hub}). --scale quick runs on embedded data."
        )


def train(cell: CellSettings, at: CellRun) -> None:
    """Train the network of a cell with the probes that its settings name."""
    from batchnorm.studies.training import train as train_cell

    train_cell(cell, at)


def training_cells(
    settings: TrainingStudySettings,
    *,
    norm: Sequence[str] = ("none", "batch"),
    lr: Sequence[float],
    **changes: Any,
) -> list[CellSettings]:
    """One cell for each seed, learning rate and norm; arms of a pair stand next to each other.

    Args:
        settings: of the study; fields that cells do not have are left out.
        norm: the arms.
        lr: the learning rates.
        changes: settings that differ from the study's.
    """
    fields = set(TrainingSettings.model_fields)
    shared = settings.model_dump(include=fields) | changes
    return [
        CellSettings(**shared, norm=one, lr=rate, seed=seed)
        for seed in range(settings.seeds)
        for rate in lr
        for one in norm
    ]


@dataclass(frozen=True)
class Study:
    """One experiment of the papers.

    ``settings`` is a model derived from :class:`StudySettings`, ``scales`` its values at ``quick``
    and ``full``; every field can be set on the command line and in TOML. ``cells`` lists what there
    is to compute with given settings, ``run`` computes one of them, and ``figures`` draws a run,
    finished or not. ``check`` raises a SettingsError where the settings ask for what the data
    cannot serve. ``lines`` names what the lines of the figures stand for, where it is not the norm.
    ``built_in_only``: it trains networks, and varies something that only the built-in ones offer.
    """

    name: str
    question: str
    source: str
    settings: type[StudySettings]
    scales: Mapping[str, StudySettings]
    cells: Callable[[Any], Sequence[CellBase]]
    claims: Sequence[Claim]
    figures: Callable[[Run], list[Chart]]
    run: Callable[[Any, CellRun], None] = train
    check: Callable[[Any], None] | None = None
    lines: Sequence[str] = ()
    built_in_only: bool = False

    def verdicts(self, run: Run) -> list[Verdict]:
        """Every claim judged from the records."""
        return [judge(claim, run) for claim in self.claims]

    @property
    def takes_your_network(self) -> bool:
        """Whether it makes sense on the user's own network and data."""
        return issubclass(self.settings, TrainingSettings) and not self.built_in_only
