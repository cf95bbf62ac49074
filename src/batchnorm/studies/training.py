"""A cell that trains a network with probes attached."""

from __future__ import annotations

from functools import lru_cache

import torch

from batchnorm.studies.cell_run import CellRun, InterruptedCellError
from batchnorm.studies.distortion import make_distortion
from batchnorm.studies.models import build_arm
from batchnorm.studies.settings import CellSettings, Scaling, SettingsError
from batchnorm.studies.tasks import Task, load_task
from batchnorm.studies.trainer import Extra, Trainer

__all__ = ["check_cells", "load_once", "task_of", "train"]


@lru_cache(maxsize=2)
def load_once(name: str, scaling: Scaling, train_limit: int | None) -> Task:
    """As :func:`load_task`, once a process."""
    return load_task(name, scaling, train_limit)


def task_of(cell: CellSettings) -> Task:
    """The data of a cell."""
    return load_once(cell.task, cell.scaling, cell.train_limit)


def train(cell: CellSettings, at: CellRun, extra: Extra | None = None) -> None:
    """Train one cell to its end, from its last checkpoint if it has one.

    Args:
        cell: what to train.
        at: where.
        extra: makes probes beside those that the settings name.

    Raises:
        InterruptedCellError: it was asked to stop.
    """
    task = task_of(cell)
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        trainer = Trainer(
            cell,
            task,
            build_arm(cell, task),
            at.folder,
            checkpoint_seconds=at.checkpoint_seconds,
            extra=extra,
        )
        if trainer.run(stop=at.stop, progress=at.progress) == "interrupted":
            raise InterruptedCellError
    finally:
        torch.set_num_threads(threads)


def check_cells(cells: list[CellSettings]) -> None:
    """Load the data and build each different network once, to see before any work that it can be.

    Raises:
        SettingsError: a setting is unknown or cannot be used with the others.
    """
    seen = set()
    for cell in cells:
        kind = cell.model_copy(update={"seed": 0, "lr": 1.0})
        if (key := kind.model_dump_json()) in seen:
            continue
        seen.add(key)
        task = task_of(cell)
        if cell.batch_size is not None and cell.batch_size > len(task.train):
            raise SettingsError(
                f"batch_size={cell.batch_size} is more than the {len(task.train)} training "
                f"examples of task {task.name!r}. Choose at most {len(task.train)}."
            )
        make_distortion(cell, task)
        build_arm(cell, task)
