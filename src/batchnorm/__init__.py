"""Batch normalization end to end: the layer, the model, the evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Frozen",
    "Ghost",
    "Guard",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Lp",
    "Ramp",
    "Renorm",
    "convert",
    "functional",
    "nn",
    "revert",
]

if TYPE_CHECKING:
    from batchnorm import functional, nn
    from batchnorm.nn import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        Frozen,
        Ghost,
        Guard,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
        Lp,
        Ramp,
        Renorm,
    )
    from batchnorm.transforms.convert import convert, revert

# Where the public names are that are not in nn. Nothing is imported before it is asked for, so
# that a command line or a reader of records starts without torch.
_HOMES = {"convert": "transforms.convert", "revert": "transforms.convert"}
_SUBMODULES = ("functional", "nn")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    if name in _SUBMODULES:
        value = import_module(f"batchnorm.{name}")
    else:
        value = getattr(import_module(f"batchnorm.{_HOMES.get(name, 'nn')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
