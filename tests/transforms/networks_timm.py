"""Real architectures, from timm, without weights."""

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

_kept = []


def timm():
    """Return timm, or skip the test.

    It imports torchvision, whose wheels bring operators that do not load beside a torch that was
    built without CUDA. They are not used; that they are declared is enough.
    """
    for name in ("timm", "torchvision"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install -c constraints.txt --group test")
    if not _kept:
        _kept.append(_operators())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its imports are not ours to mend
        return import_module("timm")


def _operators():
    try:
        torch.ops.load_library(next(Path(find_spec("torchvision").origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        return library
