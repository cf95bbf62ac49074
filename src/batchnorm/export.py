"""All records of a run as one Parquet file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from batchnorm.extras import require
from batchnorm.records import Run

__all__ = ["write_parquet"]


def write_parquet(run: Run, folder: Path) -> Path:
    """Write ``records.parquet``: the columns of the records, preceded by the cell and its axes.

    The axes are those of ``study.json``: norm, lr and seed where networks are trained.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = require("pyarrow", extra="parquet", purpose="--export parquet")
    parquet = require("pyarrow.parquet", extra="parquet", purpose="--export parquet")
    path, temporary = folder / "records.parquet", folder / "records.parquet.tmp"
    types = {
        "cell": pyarrow.string(),
        **{name: _type(pyarrow, name, run) for name in _axes(run)},
        "step": pyarrow.int64(),
        "layer": pyarrow.string(),
        "quantity": pyarrow.string(),
        "index": pyarrow.int64(),
        "value": pyarrow.float64(),
    }
    schema = pyarrow.schema(list(types.items()))
    with parquet.ParquetWriter(temporary, schema) as writer:
        for cell in run.cells:
            count = len(cell.records)
            axes = {
                "cell": cell.folder.name,
                **{name: cell.settings.get(name) for name in _axes(run)},
            }
            columns = {name: [value] * count for name, value in axes.items()}
            for name in ("step", "layer", "quantity", "index", "value"):
                columns[name] = [getattr(record, name) for record in cell.records]
            writer.write_table(pyarrow.table(columns, schema=schema))
    os.replace(temporary, path)
    return path


def _axes(run: Run) -> list[str]:
    return [name for name in run.study["cells"][0] if name != "cell"]


def _type(pyarrow: Any, name: str, run: Run) -> Any:
    value = run.study["cells"][0][name]
    if isinstance(value, str):
        return pyarrow.string()
    return pyarrow.int64() if isinstance(value, int) else pyarrow.float64()
