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
    "Sync",
    "adapt",
    "average",
    "convert",
    "desynchronize",
    "fold",
    "freeze",
    "frozen",
    "functional",
    "fuse",
    "import_statistics",
    "nn",
    "parameter_groups",
    "recalibrate",
    "replace",
    "revert",
    "strip_bias",
    "synchronize",
    "unfreeze",
    "unfuse",
    "zero_gamma",
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
        Sync,
    )
    from batchnorm.transforms.adapt import adapt
    from batchnorm.transforms.average import average
    from batchnorm.transforms.convert import convert, revert
    from batchnorm.transforms.fold import fold
    from batchnorm.transforms.freeze import freeze, frozen, unfreeze
    from batchnorm.transforms.fuse import fuse, unfuse
    from batchnorm.transforms.import_statistics import import_statistics
    from batchnorm.transforms.parameter_groups import parameter_groups
    from batchnorm.transforms.recalibrate import recalibrate
    from batchnorm.transforms.replace import replace
    from batchnorm.transforms.strip_bias import strip_bias
    from batchnorm.transforms.synchronize import desynchronize, synchronize
    from batchnorm.transforms.zero_gamma import zero_gamma

# Where the public names are that are not in nn. Nothing is imported before it is asked for, so
# that a command line or a reader of records starts without torch.
_HOMES = {
    "adapt": "transforms.adapt",
    "average": "transforms.average",
    "convert": "transforms.convert",
    "desynchronize": "transforms.synchronize",
    "fold": "transforms.fold",
    "freeze": "transforms.freeze",
    "frozen": "transforms.freeze",
    "fuse": "transforms.fuse",
    "import_statistics": "transforms.import_statistics",
    "parameter_groups": "transforms.parameter_groups",
    "recalibrate": "transforms.recalibrate",
    "replace": "transforms.replace",
    "revert": "transforms.convert",
    "strip_bias": "transforms.strip_bias",
    "synchronize": "transforms.synchronize",
    "unfreeze": "transforms.freeze",
    "unfuse": "transforms.fuse",
    "zero_gamma": "transforms.zero_gamma",
}
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
