"""Checkpoints: where a cell goes on that was stopped, and what its records held by then."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from batchnorm.records import RECORDS, RecordError

__all__ = ["CHECKPOINT", "damaged", "load_checkpoint", "save_checkpoint"]

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, the length of the records among it, atomically and to disk."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    temporary = folder / f"{CHECKPOINT}.tmp"
    with temporary.open("wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / CHECKPOINT)


def damaged(folder: Path, error: Exception) -> RecordError:
    """The error for a checkpoint that cannot be used."""
    # Not torch's own words: they advise to load it unsafely.
    return RecordError(
        f"{folder / CHECKPOINT} cannot be read ({type(error).__name__}). Remove the folder "
        f"{folder} to have this cell computed from its start."
    )


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of a cell, if it has one.

    Raises:
        RecordError: it cannot be read, or the records are shorter than it says.
    """
    if not (folder / CHECKPOINT).is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(folder / CHECKPOINT, weights_only=True)
        length = int(state["records"])
    except Exception as error:
        raise damaged(folder, error) from error
    if (found := (folder / RECORDS).stat().st_size) < length:
        raise RecordError(
            f"{folder / RECORDS} has {found} bytes, its checkpoint stands for {length}. "
            f"Remove the folder {folder} to have this cell computed from its start."
        )
    return state
