"""The main job: the same network with and without batch norm, everything measured."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

import filelock
import torch

from batchnorm.records import (
    CELLS,
    FORMAT,
    MANIFEST,
    STUDY,
    RecordError,
    Run,
    cell_hash,
    read_json,
    write_json,
)
from batchnorm.studies.callables import is_callable_name, source_hash
from batchnorm.studies.instruments import make_probes
from batchnorm.studies.models import build_arm
from batchnorm.studies.settings import CellSettings, CompareSettings, SettingsError
from batchnorm.studies.tasks import Task, load_task
from batchnorm.studies.trainer import Trainer

__all__ = ["Listener", "compare", "plan"]

_BATCH_SIZE = 60  # [P1] Section 4.1


class Listener(Protocol):
    """Who wants to know how far a study is."""

    def start(self, cells: int, steps: int) -> None:
        """So many cells of so many steps in all."""

    def cell(self, settings: CellSettings) -> None:
        """This cell begins."""

    def advance(self, steps: int) -> None:
        """So many steps more are done."""


class _Silent:
    def start(self, cells: int, steps: int) -> None:
        pass

    def cell(self, settings: CellSettings) -> None:
        pass

    def advance(self, steps: int) -> None:
        pass


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
    task = load_task(settings.task, settings.scaling, settings.train_limit)
    settings = settings.model_copy(update={"batch_size": _batch_size(settings, task)})
    cells = settings.cells({setting: source_hash(setting, name) for setting, name in own.items()})
    make_probes(cells[0], task, layers=[])
    for norm in settings.norm:
        build_arm(next(cell for cell in cells if cell.norm == norm), task)
    return task, cells


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Make ``out`` ours, or refuse; nobody else writes to it meanwhile."""
    if out.exists() and not out.is_dir():
        raise RecordError(f"{out} is a file. Name another folder with --out.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / STUDY).is_file():
            raise RecordError(
                f"{out} holds files but no {STUDY}: it is not the output of a study, and nothing "
                "in it was touched. Name another folder with --out."
            )
        read_json(out / STUDY)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / ".lock", blocking=False)
        lock.acquire()
    except filelock.Timeout:
        raise RecordError(
            f"{out} is being written by another process. Wait for it, or name another folder."
        ) from None
    except OSError as error:
        raise RecordError(
            f"{out} cannot be written ({error.strerror}). Name another folder with --out."
        ) from error
    with lock:
        yield


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a question that training answers between steps.

    The second one interrupts at once, as always.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _finished(folder: Path) -> bool:
    manifest = folder / MANIFEST
    return manifest.is_file() and read_json(manifest)["state"] in ("done", "diverged")


def compare(
    settings: CompareSettings,
    out: Path,
    *,
    command: str = "",
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
    listener = listener or _Silent()
    task, cells = plan(settings)
    interrupted = False
    with _claimed(out):
        document = {
            "format": FORMAT,
            "study": "compare",
            "settings": settings.model_dump(mode="json"),
            "command": command,
            "cells": [
                {
                    "cell": cell_hash(cell.document()),
                    "norm": cell.norm,
                    "lr": cell.lr,
                    "seed": cell.seed,
                }
                for cell in cells
            ],
        }
        write_json(out / STUDY, document)
        listener.start(len(cells), len(cells) * settings.steps)
        threads = torch.get_num_threads()
        torch.set_num_threads(settings.threads)
        try:
            with _asked_to_stop() as stop:
                for cell in cells:
                    listener.cell(cell)
                    if not _train(cell, task, out, stop, listener, checkpoint_seconds):
                        interrupted = True
                        break
        finally:
            torch.set_num_threads(threads)
    return Run.read(out), interrupted


def _train(
    settings: CellSettings,
    task: Task,
    out: Path,
    stop: Callable[[], bool],
    listener: Listener,
    checkpoint_seconds: float,
) -> bool:
    """Train one cell to its end; False: it was asked to stop before."""
    folder = out / CELLS / cell_hash(settings.document())
    done = 0
    if not _finished(folder):
        if stop():
            return False
        trainer = Trainer(
            settings,
            task,
            build_arm(settings, task),
            folder,
            checkpoint_seconds=checkpoint_seconds,
        )

        def progress(step: int) -> None:
            nonlocal done
            listener.advance(step - done)
            done = step

        if trainer.run(stop=stop, progress=progress) == "interrupted":
            return False
    listener.advance(settings.steps - done)
    return True
