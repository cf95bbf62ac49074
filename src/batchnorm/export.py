"""All records of a run as one Parquet file."""

from __future__ import annotations

import os
from pathlib import Path

from batchnorm.extras import require
from batchnorm.records import Run

__all__ = ["write_parquet"]


def write_parquet(run: Run, folder: Path) -> Path:
    """Write ``records.parquet``: the columns of the records, preceded by cell, norm, lr, seed.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    pyarrow = require("pyarrow", extra="parquet", purpose="--export parquet")
    parquet = require("pyarrow.parquet", extra="parquet", purpose="--export parquet")
    path, temporary = folder / "records.parquet", folder / "records.parquet.tmp"
    types = {
        "cell": pyarrow.string(),
        "norm": pyarrow.string(),
        "lr": pyarrow.float64(),
        "seed": pyarrow.int64(),
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
                **{a: cell.settings[a] for a in ("norm", "lr", "seed")},
            }
            columns = {name: [value] * count for name, value in axes.items()}
            for name in ("step", "layer", "quantity", "index", "value"):
                columns[name] = [getattr(record, name) for record in cell.records]
            writer.write_table(pyarrow.table(columns, schema=schema))
    os.replace(temporary, path)
    return path
