"""Images with labels through Hugging Face ``datasets``: hub names, Parquet and image folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.extras import require
from batchnorm.studies.examples import Examples, choose
from batchnorm.studies.settings import SettingsError

__all__ = ["load_hub"]

_LABELS = ("label", "labels", "fine_label", "class", "target")
_IMAGES = ("image", "img", "images", "pixels")
_TESTS = ("test", "validation", "valid", "val", "dev")
_SUFFIXES = (".parquet", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_LARGEST = 2**31  # bytes of float32 that are kept in memory


def _column(name: str, kind: str, found: list[str], candidates: tuple[str, ...]) -> str:
    for candidate in candidates:
        if candidate in found:
            return candidate
    raise SettingsError(
        f"task={name!r} has no column of {kind}: it has {', '.join(found)}; looked for "
        f"{', '.join(candidates)}. Rename the column, or give the data as module:callable."
    )


def _read(datasets: Any, name: str, part: str, split: Any) -> Examples:
    columns = list(split.features)
    image_column = _column(name, "images", columns, _IMAGES)
    label_column = _column(name, "labels", columns, _LABELS)
    labels = np.asarray(split[label_column])
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise SettingsError(
            f"task={name!r}: column {label_column!r} of the {part} set does not hold class numbers "
            f"of at least 0 (missing labels are often -1). Give the data as module:callable."
        )
    # Some writers leave out the note that these bytes are images.
    decoded = split.cast_column(image_column, datasets.Image())
    images = [np.asarray(image) for image in decoded[image_column]]
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise SettingsError(
            f"task={name!r}: images of the {part} set come in {len(shapes)} sizes, such as "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}; they must have one. Resize them first."
        )
    if len(images) * images[0].size * 4 > _LARGEST:
        raise SettingsError(
            f"task={name!r}: {len(images)} images of shape {images[0].shape} do not fit into "
            f"{_LARGEST >> 30} GiB of memory as float32. Use smaller images or fewer of them."
        )
    x = torch.from_numpy(np.stack(images)).float()
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    return Examples(x, torch.from_numpy(labels.astype(np.int64)))


def load_hub(name: str, train_limit: int | None) -> tuple[str, Examples, Examples, str]:
    """Load a hub data set or a folder in the hub's layout.

    Of the training set only a fixed random choice of ``train_limit`` examples is decoded.

    Returns:
        The name, the training set, the test set, and a note on where they come from.

    Raises:
        SettingsError: nothing readable there, no labels, or images of several sizes.
    """
    datasets = require("datasets", extra="hub", purpose=f"the task {name!r}")
    datasets.disable_progress_bars()
    local = Path(name).exists()
    # The library would take any text file for data.
    if local and not any(p.suffix.lower() in _SUFFIXES for p in Path(name).rglob("*")):
        raise SettingsError(
            f"task={name!r} holds no data: a folder needs train and test Parquet files, or images "
            "as train/CLASS/*.png and test/CLASS/*.png."
        )
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        what = "cannot be read" if local else "no such folder, and the hub gave nothing"
        raise SettingsError(
            f"task={name!r}: {what} ({type(error).__name__}: {str(error).splitlines()[0]}). "
            "Without a network use the embedded task 'digits', or a folder."
        ) from error
    if "train" not in splits:
        raise SettingsError(
            f"task={name!r} has no training set, only {', '.join(splits)}. Name a file train*."
        )
    test = next((part for part in _TESTS if part in splits), None)
    if test is None:
        held_out = splits["train"].train_test_split(test_size=0.2, seed=0)
        splits, test, how = held_out, "test", "a fifth of the training set held out as test set"
    else:
        how = f"test set: {test}"
    note = f"{'folder' if local else 'hub data set'} {name}; {how}"
    train = splits["train"]
    train = _read(datasets, name, "training", train.select(choose(len(train), train_limit, 0)))
    return name, train, _read(datasets, name, "test", splits[test]), note
