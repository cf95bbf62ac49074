"""Modules: state and arguments, no maths."""

from batchnorm.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.guard import Guard
from batchnorm.nn.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.nn.statistics import Frozen, Ghost, Lp, Ramp, Renorm, Statistics, Sync

__all__ = [
    "BatchNorm",
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
    "Statistics",
    "Sync",
]
