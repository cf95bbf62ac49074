"""Real architectures, from timm, without weights."""

import warnings
from importlib import import_module
from importlib.util import find_spec

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
            pytest.skip(f"{name} is not installed; pip install --group test")
    if not _kept and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _kept.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its imports are not ours to mend
        return import_module("timm")
