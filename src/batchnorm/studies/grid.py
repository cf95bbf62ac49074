"""Runs cells: one after the other here, over processes, over a Dask cluster, or over Slurm.

Wherever a cell is computed, it is alone in its process and alone on its folder, and asks now and
then whether to stop. Processes talk through the run folder and nothing else: a file that asks all
of them to stop, and one in each cell that says how far it is. So nothing is lost when any of them
is killed, and the same folder can be worked on by another kind of grid the next time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock

from batchnorm.extras import MissingExtraError, require
from batchnorm.records import RecordError
from batchnorm.studies.cell_run import CellRun, InterruptedCellError
from batchnorm.studies.folder import asked_to_stop, finished
from batchnorm.studies.settings import CellBase, SettingsError

__all__ = ["Job", "Listener", "Silent", "check_cluster", "run_jobs"]

_ANSWER_SECONDS = 10.0
"""How long a cluster may take to answer."""

_LOOK_SECONDS = 0.2
"""How often a worker looks whether it shall stop, and says how far it is."""

_STOP, _PROGRESS, _LOCK = ".stop", "progress", ".lock"


@dataclass(frozen=True)
class Job:
    """One cell to compute: everything that a process elsewhere needs for it."""

    run: Callable[[Any, CellRun], None]
    settings: CellBase
    folder: Path


class Listener(Protocol):
    """Who wants to know how far a study is."""

    def start(self, cells: int, steps: int) -> None:
        """So many cells of so many steps in all."""

    def cell(self, settings: CellBase) -> None:
        """This cell begins."""

    def advance(self, steps: int) -> None:
        """So many steps more are done."""


class Silent:
    """A listener that wants to know nothing."""

    def start(self, cells: int, steps: int) -> None:
        """Nothing."""

    def cell(self, settings: CellBase) -> None:
        """Nothing."""

    def advance(self, steps: int) -> None:
        """Nothing."""


_alone = threading.Lock()  # torch's random numbers are one stream a process, not one a thread


def _compute(
    job: Job,
    stop: Callable[[], bool],
    progress: Callable[[int], None],
    checkpoint_seconds: float,
) -> bool:
    """Compute one cell, unless it is finished; False: it was asked to stop before."""
    import torch

    with _alone:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(job.folder / _LOCK)
        while not stop():
            # Somebody else has it: a worker of a grid that was killed, about to notice.
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=_LOOK_SECONDS)
                break
        else:
            return False
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same sums everywhere; small networks are fastest so too
        try:
            if not finished(job.folder):
                at = CellRun(
                    job.settings,
                    job.folder,
                    stop=stop,
                    progress=progress,
                    checkpoint_seconds=checkpoint_seconds,
                )
                job.run(job.settings, at)
        except InterruptedCellError:
            return False
        finally:
            torch.set_num_threads(threads)
            lock.release()
    return True


def _orphaned(parent: int | None) -> bool:
    """Whether the process that asked for the work is gone."""
    return parent is not None and os.getppid() != parent


def _in_worker(
    job: Job, stop_file: Path, parent: int | None, checkpoint_seconds: float
) -> tuple[Path, bool, Exception | None]:
    """Compute one cell in another process than the one that was asked for it."""
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches every process of a terminal; who was asked decides for all of them.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    looked, said, asked = 0.0, 0.0, False

    def stop() -> bool:
        nonlocal looked, asked
        if not asked and time.monotonic() - looked >= _LOOK_SECONDS:
            looked = time.monotonic()
            asked = stop_file.exists() or _orphaned(parent)
        return asked

    def progress(units: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _LOOK_SECONDS:
            said = time.monotonic()
            (job.folder / _PROGRESS).write_text(str(units))

    try:
        return job.folder, _compute(job, stop, progress, checkpoint_seconds), None
    except (RecordError, SettingsError, MissingExtraError) as error:
        return job.folder, False, error  # the other cells go on
    finally:
        (job.folder / _PROGRESS).unlink(missing_ok=True)
        if _orphaned(parent):
            os._exit(1)  # nobody waits for the result, or would send this process away


class _Monitor:
    """Passes on, while the workers work: the wish to stop to them, their progress from them."""

    def __init__(
        self, jobs: Sequence[Job], stop: Callable[[], bool], stop_file: Path, listener: Listener
    ) -> None:
        self._left = {job.folder: job for job in jobs}
        self._done = dict.fromkeys(self._left, 0)
        self._begun: set[Path] = set()
        self._stop, self._stop_file, self._listener = stop, stop_file, listener
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            if self._stop():
                self._stop_file.touch()
            with self._lock:
                for folder in list(self._left):
                    with contextlib.suppress(OSError, ValueError):
                        self._reached(folder, int((folder / _PROGRESS).read_text()))

    def _reached(self, folder: Path, units: int) -> None:
        if folder not in self._begun:
            self._begun.add(folder)
            self._listener.cell(self._left[folder].settings)
        self._listener.advance(units - self._done[folder])
        self._done[folder] = units

    def ended(self, folder: Path) -> None:
        """A cell is done."""
        with self._lock:
            self._reached(folder, self._left[folder].settings.units)
            del self._left[folder]

    def __enter__(self) -> _Monitor:
        self._stop_file.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._stop_file.unlink(missing_ok=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that begin here never see Ctrl-C, not even while they are starting."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_Outcomes = Iterator[tuple[Path, bool, Exception | None]]


def _processes(calls: Sequence[tuple[Any, ...]], workers: int) -> _Outcomes:
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with _interrupts_held():
        parallel = joblib.Parallel(
            n_jobs=workers,
            backend="loky",
            batch_size=1,
            return_as="generator_unordered",
            idle_worker_timeout=30,  # a worker that is idle does not notice that it is orphaned
        )
        outcomes = parallel(joblib.delayed(_in_worker)(*call) for call in calls)
    try:
        with warnings.catch_warnings():
            # Cells of different kinds need different memory, which loky takes for a leak: it
            # replaces the worker between two cells, and nothing is lost.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            yield from outcomes
    except TerminatedWorkerError as error:
        raise RecordError(
            "A worker process was killed, perhaps for want of memory. What was done is kept: the "
            "same command goes on, with fewer --jobs if need be."
        ) from error


@contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    distributed = require("distributed", extra="dask", purpose=f"--cluster {address}")
    try:
        client = distributed.Client(address, timeout=_ANSWER_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise SettingsError(
            f"cluster={address!r} does not answer within {_ANSWER_SECONDS:g} s "
            f"({type(error).__name__}). Start one with `dask scheduler` and `dask worker`, or "
            "leave --cluster out to use this machine."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_ANSWER_SECONDS)
        except TimeoutError as error:
            raise SettingsError(
                f"cluster={address!r} has no workers. Start some with `dask worker {address}`."
            ) from error
        yield client


def _dask(calls: Sequence[tuple[Any, ...]], address: str) -> _Outcomes:
    import joblib

    with _dask_client(address), joblib.parallel_config("dask"):
        parallel = joblib.Parallel(n_jobs=-1, batch_size=1, return_as="generator_unordered")
        yield from parallel(joblib.delayed(_in_worker)(*call) for call in calls)


def _slurm(
    calls: Sequence[tuple[Any, ...]], cluster: str, workers: int, out: Path, stop_file: Path
) -> _Outcomes:
    submitit = require("submitit", extra="slurm", purpose=f"--cluster {cluster}")
    executor = submitit.AutoExecutor(folder=out / ".slurm", cluster=cluster)
    executor.update_parameters(name="batchnorm", cpus_per_task=1)
    if cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=workers)
    with executor.batch():
        left = [executor.submit(_in_worker, *call) for call in calls]
    while left:
        for job in list(left):
            if job.done():
                left.remove(job)
                yield job.result()
            elif stop_file.exists() and job.state == "PENDING":
                left.remove(job)  # it must not begin once everybody has left
                job.cancel()
        time.sleep(_LOOK_SECONDS)


SLURM = ("slurm", "local")
"""Clusters that submitit serves; ``local`` runs its jobs as processes of this machine."""


def check_cluster(cluster: str) -> None:
    """See that a cluster is there.

    Raises:
        SettingsError: it is not, or the name says nothing.
        MissingExtraError: the package for it is not installed.
    """
    if "://" in cluster:
        with _dask_client(cluster):
            return
    if cluster not in SLURM:
        raise SettingsError(
            f"cluster={cluster!r} is unknown. Give the address of a Dask scheduler "
            "(tcp://host:8786) or slurm, or leave it out to use this machine."
        )
    submitit = require("submitit", extra="slurm", purpose=f"--cluster {cluster}")
    if cluster == "slurm" and submitit.AutoExecutor.which() != "slurm":
        raise SettingsError(
            "cluster='slurm': this machine has no srun. Log in to a machine of the cluster, or "
            "leave --cluster out to use this one."
        )


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    cluster: str | None = None,
    listener: Listener | None = None,
    checkpoint_seconds: float = 15.0,
) -> bool:
    """Compute all cells that are not finished.

    Args:
        jobs: the cells.
        out: a folder that all workers see, for the file that asks them to stop.
        workers: cells computed at the same time; one is computed in this very process.
        cluster: address of a Dask scheduler or ``slurm``; by default this machine.
        listener: told about progress.
        checkpoint_seconds: time between two checkpoints of a cell.

    Returns:
        Whether all cells are finished; if not, Ctrl-C or SIGTERM ended it.

    Raises:
        RecordError: a cell's folder is damaged; the other cells were computed all the same.
    """
    listener = listener or Silent()
    listener.start(len(jobs), sum(job.settings.units for job in jobs))
    left = []
    for job in jobs:
        if finished(job.folder):
            listener.cell(job.settings)
            listener.advance(job.settings.units)
        else:
            left.append(job)
    if not left:
        return True
    with asked_to_stop() as stop:
        if cluster is None and (workers == 1 or len(left) == 1):
            return all(_here(job, stop, listener, checkpoint_seconds) for job in left)
        stop_file = out.resolve() / _STOP
        parent = os.getpid() if cluster is None else None
        calls = [
            (
                Job(job.run, job.settings, job.folder.resolve()),
                stop_file,
                parent,
                checkpoint_seconds,
            )
            for job in left
        ]
        if cluster is None:
            outcomes = _processes(calls, min(workers, len(left)))
        elif cluster in SLURM:
            outcomes = _slurm(calls, cluster, workers, out.resolve(), stop_file)
        else:
            outcomes = _dask(calls, cluster)
        errors, done = [], 0
        with _Monitor([call[0] for call in calls], stop, stop_file, listener) as monitor:
            for folder, over, error in outcomes:
                errors += [error] if error else []
                if over:
                    done += 1
                    monitor.ended(folder)
    if errors:
        raise errors[0]
    return done == len(left)


def _here(
    job: Job, stop: Callable[[], bool], listener: Listener, checkpoint_seconds: float
) -> bool:
    """Compute one cell in this process."""
    listener.cell(job.settings)
    done = 0

    def progress(units: int) -> None:
        nonlocal done
        listener.advance(units - done)
        done = units

    if not _compute(job, stop, progress, checkpoint_seconds):
        return False
    listener.advance(job.settings.units - done)
    return True
