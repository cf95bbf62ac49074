"""Batch normalization end to end: the layer, the model, the evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "functional", "nn"]

if TYPE_CHECKING:
    from batchnorm import functional, nn
    from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

# Where each name is; nothing is imported before it is asked for, so that a command line or a
# reader of records starts without torch.
_HOMES = dict.fromkeys(("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"), "batchnorm.nn")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in __all__:
        value = import_module(f"batchnorm.{name}")
    else:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
