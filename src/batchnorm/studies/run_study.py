"""Plans a study, runs its cells, and says how far it is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from batchnorm.records import (
    CELLS,
    ENDED,
    FORMAT,
    MANIFEST,
    STUDY,
    Run,
    cell_hash,
    read_json,
    write_json,
)
from batchnorm.studies.callables import is_callable_name, source_hash
from batchnorm.studies.cell_run import CellRun, InterruptedCellError
from batchnorm.studies.folder import check_ours, claimed, state_of
from batchnorm.studies.grid import Job, Listener, check_cluster, run_jobs
from batchnorm.studies.settings import (
    CellBase,
    CellSettings,
    SettingsError,
    StudySettings,
    problems,
)
from batchnorm.studies.study import Study
from batchnorm.studies.unknown import unknown

__all__ = ["Plan", "estimate", "plan_study", "run_studies", "settings_of"]

Scale = Literal["quick", "full"]


def settings_of(study: Study, scale: str, changes: dict[str, Any]) -> StudySettings:
    """The settings of a study at a scale, with changes.

    Raises:
        SettingsError: the scale or a setting is unknown, or a value cannot be used.
    """
    if scale not in study.scales:
        raise SettingsError(unknown("scale", scale, study.scales))
    values = study.scales[scale].model_dump(exclude_unset=True) | changes
    try:
        return study.settings(**values)
    except ValidationError as error:
        raise SettingsError(problems(error, settings=study.settings)) from error


@dataclass(frozen=True)
class Plan:
    """A study with settings: the cells to compute and where they go."""

    study: Study
    scale: str
    settings: StudySettings
    out: Path
    command: str
    jobs: list[Job]

    def state(self, job: Job) -> str:
        """``done``, ``diverged``, ``interrupted``, ``running``, or ``missing``."""
        return state_of(job.folder)

    def missing(self) -> list[Job]:
        """The cells that still have to be computed."""
        return [job for job in self.jobs if self.state(job) not in ENDED]

    def check(self) -> None:
        """See before any work that every cell can be computed.

        Raises:
            SettingsError: the data or the network cannot serve these settings.
        """
        if self.study.check is not None:
            self.study.check(self.settings)
        trained = [j.settings for j in self.jobs if isinstance(j.settings, CellSettings)]
        if trained:
            from batchnorm.studies.training import check_cells

            check_cells(trained)

    def document(self) -> dict[str, Any]:
        """What ``study.json`` holds."""
        return {
            "format": FORMAT,
            "study": self.study.name,
            "scale": self.scale,
            "settings": self.settings.model_dump(mode="json"),
            "command": self.command,
            "cells": [{"cell": job.folder.name, **job.settings.axes()} for job in self.jobs],
        }


def _with_sources(cell: CellBase) -> CellBase:
    """The cell with hashes of the user's own code, so that an edit makes it a new cell."""
    if "code" not in type(cell).model_fields:
        return cell
    named = {s: str(getattr(cell, s)) for s in ("task", "model") if hasattr(cell, s)}
    code = {s: source_hash(s, name) for s, name in named.items() if is_callable_name(name)}
    return cell.model_copy(update={"code": code}) if code else cell


def plan_study(
    study: Study, settings: StudySettings, out: Path, *, scale: str = "quick", command: str = ""
) -> Plan:
    """List the cells of a study; nothing is written.

    Raises:
        SettingsError: a setting is unknown or cannot be used with the others.
        RecordError: ``out`` belongs to something else or to another version.
    """
    check_ours(out, study.name)
    cells = [_with_sources(cell) for cell in study.cells(settings)]
    jobs = [Job(study.run, cell, out / CELLS / cell_hash(cell.document())) for cell in cells]
    return Plan(study, scale, settings, out, command, jobs)


def run_studies(
    plans: Sequence[Plan],
    out: Path,
    *,
    workers: int = 1,
    cluster: str | None = None,
    listener: Listener | None = None,
    checkpoint_seconds: float = 15.0,
) -> tuple[list[Run], bool]:
    """Compute what is missing of several studies, all their cells in one grid.

    Args:
        plans: the studies.
        out: a folder that all workers see.
        workers: cells computed at the same time.
        cluster: see :func:`batchnorm.studies.grid.run_jobs`.
        listener: told about progress.
        checkpoint_seconds: time between two checkpoints of a cell.

    Returns:
        The runs, and whether they were interrupted.

    Raises:
        SettingsError: the settings or the cluster cannot be used; nothing was written.
        RecordError: a folder is not ours, cannot be written, or is damaged.
    """
    for plan in plans:
        plan.check()
    if cluster is not None:
        check_cluster(cluster)
    jobs = [job for plan in plans for job in plan.jobs]
    with ExitStack() as claims:
        for plan in plans:
            claims.enter_context(claimed(plan.out, plan.study.name))
            write_json(plan.out / STUDY, plan.document())
        complete = run_jobs(
            jobs,
            out,
            workers=workers,
            cluster=cluster,
            listener=listener,
            checkpoint_seconds=checkpoint_seconds,
        )
    return [Run.read(plan.out) for plan in plans], not complete


_TRIAL_SECONDS = 2.0


def estimate(plan: Plan, workers: int) -> float:
    """Seconds that what is missing will take, on this machine.

    From the cells that are done or, without any, from computing the first one for two seconds in a
    folder that is thrown away; each kind of cells by itself, as only those have a unit in common.
    """
    missing = plan.missing()
    done = [job for job in plan.jobs if plan.state(job) == "done"]
    seconds = 0.0
    for kind in dict.fromkeys(type(job.settings) for job in missing):
        left, past = (
            [job for job in jobs if type(job.settings) is kind] for jobs in (missing, done)
        )
        seconds += _pace(left[0], past) * sum(job.settings.units for job in left)
    return seconds / max(1, min(workers, len(missing)))


def _pace(missing: Job, done: Sequence[Job]) -> float:
    """Seconds a unit, from cells that are done or from a trial of one that is missing."""
    if done:
        seconds = sum(read_json(job.folder / MANIFEST)["timing"]["total"] for job in done)
        return float(seconds / sum(job.settings.units for job in done))
    return _trial(missing)


def _trial(job: Job) -> float:
    """Seconds a unit of one cell, tried for a moment."""
    times: list[tuple[float, int]] = []

    def progress(units: int) -> None:
        times.append((time.monotonic(), units))

    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        at = CellRun(
            job.settings,
            Path(folder),
            # What comes before the first step, such as loading the data, is done once a process.
            stop=lambda: bool(times) and time.monotonic() - times[0][0] > _TRIAL_SECONDS,
            progress=progress,
        )
        try:
            job.run(job.settings, at)
        except InterruptedCellError:
            (first, start), (last, end) = times[0], times[-1]
            return (last - first) / max(end - start, 1)
    return (time.monotonic() - began) / job.settings.units
