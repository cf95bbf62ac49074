"""What a cell gets to work with: its folder, records, checkpoints, and the question to stop."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from batchnorm import __version__
from batchnorm.records import FORMAT, MANIFEST, RECORDS, Record, RecordWriter, write_json
from batchnorm.studies.settings import CellBase

__all__ = ["CellRun", "InterruptedCellError", "write_manifest"]


class InterruptedCellError(Exception):
    """The cell was asked to stop; its checkpoint is written."""


def write_manifest(
    folder: Path,
    settings: CellBase,
    state: str,
    step: int,
    seconds: Mapping[str, float],
    **more: Any,
) -> None:
    """Write the manifest of one cell: ``more`` is what only some kinds of cells have."""
    import torch

    from batchnorm.ops import kernels

    document = {
        "format": FORMAT,
        "cell": folder.name,
        "settings": settings.document(),
        "state": state,
        "step": step,
        "versions": {
            "batchnorm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernels": kernels(),
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "timing": {
            **{name: round(value, 3) for name, value in seconds.items()},
            "total": round(sum(seconds.values()), 3),
        },
    }
    write_json(folder / MANIFEST, document | more)


class CellRun:
    """One cell being computed.

    A calculation loops over :meth:`steps` and writes records; everything else is done here: it
    goes on from the last checkpoint, stops when asked to, and its records end byte for byte as if
    it had never been interrupted. For that a step may depend on nothing but the cell's settings,
    the step's number, :attr:`state` and torch's random numbers, all of which are restored.
    """

    def __init__(
        self,
        settings: CellBase,
        folder: Path,
        *,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda units: None,
        checkpoint_seconds: float = 15.0,
    ) -> None:
        """Work on the cell ``settings`` in ``folder``."""
        self.settings, self.folder = settings, folder
        self.stop, self.progress = stop, progress
        self.checkpoint_seconds = checkpoint_seconds
        self.state: dict[str, Any] = {}
        """Tensors and plain values that one step leaves to the next; empty at the start."""
        self._records: RecordWriter | None = None

    def write(self, records: Iterable[Record]) -> None:
        """Append records; only within a loop over :meth:`steps`."""
        assert self._records is not None, "records are written within `for step in at.steps(...)`"
        self._records.write(records)

    def steps(self, count: int, layers: Sequence[str] = ()) -> Iterator[int]:
        """Yield the numbers of the steps that are left of ``count``.

        Args:
            count: number of steps of the whole cell.
            layers: names that records give as their ``layer``, first to last.

        Raises:
            InterruptedCellError: the cell was asked to stop.
        """
        import torch

        from batchnorm.studies.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint

        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.settings.seed)
        first, spent, keep = 0, 0.0, 0
        if (found := load_checkpoint(self.folder)) is not None:
            first, spent, keep = found["step"], found["seconds"], found["records"]
            self.state = found["state"]
            torch.set_rng_state(found["random"])
        began = saved = time.monotonic()

        def manifest(state: str, step: int) -> None:
            seconds = {"train": spent + time.monotonic() - began}
            write_manifest(self.folder, self.settings, state, step, seconds, layers=list(layers))

        def checkpoint(step: int) -> None:
            save_checkpoint(
                self.folder,
                {
                    "state": self.state,
                    "random": torch.get_rng_state(),
                    "step": step,
                    "seconds": spent + time.monotonic() - began,
                    "records": writer.sync(),
                },
            )

        with RecordWriter(self.folder / RECORDS, keep=keep) as writer:
            self._records = writer
            manifest("running", first)
            for step in range(first, count):
                yield step
                self.progress((step + 1) * self.settings.units // count)
                if step + 1 < count and self.stop():
                    checkpoint(step + 1)
                    manifest("interrupted", step + 1)
                    raise InterruptedCellError
                if time.monotonic() - saved >= self.checkpoint_seconds:
                    checkpoint(step + 1)
                    saved = time.monotonic()
            writer.sync()
        manifest("done", count)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
