"""The folder of a run: whose it is, what it holds, and how work on it is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import filelock

from batchnorm.records import ENDED, MANIFEST, STUDY, RecordError, read_json

__all__ = ["asked_to_stop", "check_ours", "claimed", "finished", "state_of"]


def check_ours(out: Path, study: str) -> None:
    """See that ``out`` is new, empty, or an earlier run of ``study``.

    Raises:
        RecordError: it is something else, or a run of another study or of another version.
    """
    if out.exists() and not out.is_dir():
        raise RecordError(f"{out} is a file. Name another folder with --out.")
    if out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        if not (out / STUDY).is_file():
            raise RecordError(
                f"{out} holds files but no {STUDY}: it is not the output of a study, and nothing "
                "in it was touched. Name another folder with --out."
            )
        other = read_json(out / STUDY).get("study", study)
        if other != study:
            raise RecordError(
                f"{out} holds the study {other!r}, not {study!r}. Name another folder with --out."
            )


@contextmanager
def claimed(out: Path, study: str) -> Iterator[None]:
    """Make ``out`` ours, or refuse; nobody else writes to it meanwhile."""
    check_ours(out, study)
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
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a question that work answers between steps.

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


def state_of(folder: Path) -> str:
    """State of a cell as its manifest has it; ``missing`` where there is none."""
    manifest = folder / MANIFEST
    return str(read_json(manifest)["state"]) if manifest.is_file() else "missing"


def finished(folder: Path) -> bool:
    """Whether a cell need not be computed again."""
    return state_of(folder) in ENDED
