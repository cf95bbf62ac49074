"""The main job: the same network with and without batch norm, everything measured."""

from __future__ import annotations

from pathlib import Path

from batchnorm.records import CELLS, FORMAT, STUDY, Run, cell_hash, write_json
from batchnorm.studies.callables import is_callable_name, source_hash
from batchnorm.studies.distortion import make_distortion
from batchnorm.studies.folder import claimed
from batchnorm.studies.grid import Job, Listener, run_jobs
from batchnorm.studies.instruments import make_probes
from batchnorm.studies.models import build_arm
from batchnorm.studies.settings import CellSettings, CompareSettings, SettingsError
from batchnorm.studies.tasks import Task
from batchnorm.studies.training import load_once, train

__all__ = ["compare", "plan"]

_BATCH_SIZE = 60  # [P1] Section 4.1


def _batch_size(settings: CompareSettings, task: Task) -> int:
    examples = len(task.train)
    if settings.batch_size is None:
        return examples if task.name == "gaussian" else min(_BATCH_SIZE, examples)
    if settings.batch_size > examples:
        raise SettingsError(
            f"batch_size={settings.batch_size} is more than the {examples} training examples of "
            f"task {task.name!r}. Choose at most {examples}."
        )
    return settings.batch_size


def plan(settings: CompareSettings) -> tuple[Task, list[CellSettings]]:
    """Load the data and list the cells, having built each arm once to see that it can be.

    Raises:
        SettingsError: a setting is unknown or cannot be used with the others.
    """
    named = (("task", settings.task), ("model", settings.model))
    own = {setting: name for setting, name in named if is_callable_name(name)}
    task = load_once(settings.task, settings.scaling, settings.train_limit)
    settings = settings.model_copy(update={"batch_size": _batch_size(settings, task)})
    cells = settings.cells({setting: source_hash(setting, name) for setting, name in own.items()})
    make_probes(cells[0], task, layers=[])
    make_distortion(cells[0], task)
    for norm in settings.norm:
        build_arm(next(cell for cell in cells if cell.norm == norm), task)
    return task, cells


def compare(
    settings: CompareSettings,
    out: Path,
    *,
    command: str = "",
    jobs: int = 1,
    listener: Listener | None = None,
    checkpoint_seconds: float = 15.0,
) -> tuple[Run, bool]:
    """Train every arm with every learning rate and seed, and record what the probes see.

    Cells that ``out`` already holds are not computed again; an unfinished one goes on from its
    last checkpoint and ends with the same records as if it had never stopped.

    Args:
        settings: what to compare.
        out: the run folder; new, empty, or an earlier run.
        command: what to type to run this again, for the report.
        jobs: cells trained at the same time, each in a process of its own.
        listener: told about progress.
        checkpoint_seconds: time between two checkpoints of a cell.

    Returns:
        The run, and whether it was interrupted.

    Raises:
        SettingsError: the settings cannot be used; nothing was written.
        RecordError: ``out`` is not ours, cannot be written, or is damaged.

    Example:
        >>> settings = CompareSettings(steps=20, lr=(0.1,), seeds=1)
        >>> run, interrupted = compare(settings, getfixture("tmp_path") / "run")
        >>> [cell.manifest["state"] for cell in run.cells]
        ['done', 'done']
    """
    _, cells = plan(settings)
    work = [Job(train, cell, out / CELLS / cell_hash(cell.document())) for cell in cells]
    with claimed(out, "compare"):
        document = {
            "format": FORMAT,
            "study": "compare",
            "settings": settings.model_dump(mode="json"),
            "command": command,
            "cells": [{"cell": job.folder.name, **job.settings.axes()} for job in work],
        }
        write_json(out / STUDY, document)
        complete = run_jobs(
            work, out, workers=jobs, listener=listener, checkpoint_seconds=checkpoint_seconds
        )
    return Run.read(out), not complete
