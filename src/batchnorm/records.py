"""Records: what a cell writes while it trains, and all that report and lab read.

A *run folder* holds one study::

    study.json                 the study's name, its settings, its cells in order
    cells/<hash>/manifest.json settings, state, layers, versions, machine, timing of one cell
    cells/<hash>/records.jsonl the measurements: one tidy, append-only table

The columns and quantities are documented in ``docs/records.md``. This module needs neither
torch nor any other third-party package, so that anything can read records.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

__all__ = [
    "CELLS",
    "ENDED",
    "FORMAT",
    "MANIFEST",
    "RECORDS",
    "STUDY",
    "Cell",
    "Record",
    "RecordError",
    "RecordWriter",
    "Run",
    "cell_hash",
    "read_json",
    "read_records",
    "write_json",
]

FORMAT = 1
"""Version of the layout of a run folder. A folder of another version is refused, never mixed."""

ENDED = ("done", "diverged")
"""States of a cell that is not computed again."""

STUDY, MANIFEST, RECORDS, CELLS = "study.json", "manifest.json", "records.jsonl", "cells"


class RecordError(Exception):
    """A run folder or one of its files is not what it should be; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement."""

    step: int
    layer: str  # "" for the whole network
    quantity: str
    value: float
    index: int = 0  # position within a vector-valued quantity such as a histogram


def cell_hash(settings: Mapping[str, Any]) -> str:
    """Name of the folder of a cell: the hash of its settings and of the format."""
    canonical = json.dumps({"format": FORMAT, **settings}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _to_json(record: Record) -> str:
    # JSON has no NaN or infinity: they become strings that both float() and Number() read.
    value: float | str = record.value
    if not math.isfinite(record.value):
        value = "NaN" if math.isnan(record.value) else f"{'-' * (record.value < 0)}Infinity"
    row: dict[str, Any] = {"step": record.step, "layer": record.layer, "quantity": record.quantity}
    if record.index:
        row["index"] = record.index
    row["value"] = value
    return json.dumps(row, separators=(",", ":"))


def _from_json(line: str) -> Record:
    row = json.loads(line)
    return Record(
        int(row["step"]),
        str(row["layer"]),
        str(row["quantity"]),
        float(row["value"]),
        int(row.get("index", 0)),
    )


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of one ``records.jsonl``.

    A last line without a line end was cut off by a kill: it is not a record yet and is left out.

    Raises:
        RecordError: a complete line is not a record.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield _from_json(line)
            except (ValueError, KeyError, TypeError) as error:
                raise RecordError(
                    f"{path}, line {number} is not a record: {line.strip()[:80]!r} ({error}). "
                    f"Remove the folder {path.parent} to have this cell computed again."
                ) from error


class RecordWriter:
    """Appends records to a file; everything up to a :meth:`sync` survives a kill."""

    def __init__(self, path: Path, *, keep: int = 0) -> None:
        """Open ``path``, keeping its first ``keep`` bytes and discarding what follows."""
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._file.truncate(keep)
        self._file.seek(0, os.SEEK_END)

    def write(self, records: Iterable[Record]) -> None:
        """Append records; they may stay in memory until :meth:`sync`."""
        self._file.writelines(_to_json(record) + "\n" for record in records)

    def sync(self) -> int:
        """Force everything to disk and return the length of the file in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of our JSON documents.

    Raises:
        RecordError: it is damaged, or of another format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is not readable JSON ({error}). Restore or remove it.") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else None
        raise RecordError(
            f"{path} has format {found!r}, this version reads format {FORMAT}. "
            "Read it with the version that wrote it, or choose another folder."
        )
    return document


@dataclass(frozen=True)
class Cell:
    """One combination of settings, with what it measured."""

    folder: Path
    manifest: dict[str, Any]
    records: tuple[Record, ...]

    @cached_property
    def _series(self) -> dict[tuple[str, str, int], dict[int, float]]:
        table: dict[tuple[str, str, int], dict[int, float]] = {}
        for r in self.records:
            table.setdefault((r.quantity, r.layer, r.index), {})[r.step] = r.value
        return table

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the cell's hash is made of."""
        settings: dict[str, Any] = self.manifest["settings"]
        return settings

    @property
    def ended(self) -> bool:
        """Whether the cell ran to its end; diverging is an end too."""
        return self.manifest["state"] in ENDED

    @property
    def layers(self) -> list[str]:
        """Names of the layers, first to last."""
        layers: list[str] = self.manifest["layers"]
        return layers

    def series(self, quantity: str, layer: str = "", index: int = 0) -> dict[int, float]:
        """Values of one quantity by step; empty where it was not measured."""
        return self._series.get((quantity, layer, index), {})


@dataclass(frozen=True)
class Run:
    """A run folder: one study with the cells that have started."""

    folder: Path
    study: dict[str, Any]
    cells: tuple[Cell, ...]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            RecordError: the folder is not a run folder, of another format, or damaged.
        """
        path = folder / STUDY
        if not path.is_file():
            raise RecordError(
                f"{folder} holds no {STUDY}: it is not the output of a study. "
                "Name a folder that `batchnorm compare` or `batchnorm study` wrote."
            )
        study = read_json(path)
        cells = []
        for entry in study["cells"]:
            cell = folder / CELLS / entry["cell"]
            if (cell / MANIFEST).is_file():
                records = cell / RECORDS
                rows = tuple(read_records(records)) if records.is_file() else ()
                cells.append(Cell(cell, read_json(cell / MANIFEST), rows))
        return cls(folder, study, tuple(cells))

    def by_seed(self, **settings: Any) -> dict[int, Cell]:
        """The cells with these settings that ran to their end, by seed.

        Raises:
            ValueError: two of them have the same seed, so that the settings do not name one arm.
        """
        found: dict[int, Cell] = {}
        for cell in self.cells:
            own = cell.settings
            if cell.ended and all(own.get(name) == value for name, value in settings.items()):
                if own["seed"] in found:
                    raise ValueError(f"{settings} is more than one cell of seed {own['seed']}")
                found[int(own["seed"])] = cell
        return dict(sorted(found.items()))
