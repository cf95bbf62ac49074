"""Statistics of the data for layers that keep the ones they are given."""

from __future__ import annotations

from torch import nn

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.statistics import Frozen
from batchnorm.studies.examples import Examples
from batchnorm.transforms.recalibrate import recalibrate

__all__ = ["measure_frozen"]

_EXAMPLES = 1000
_BATCH = 250


def measure_frozen(model: nn.Module, train: Examples) -> None:
    """Give each layer with ``Frozen()`` statistics those of at most 1,000 training examples.

    They are measured together, as batch norm on these examples would see them, and stay so
    whatever the weights become.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (BatchNorm1d, BatchNorm2d, BatchNorm3d))
        and isinstance(module.statistics, Frozen)
    ]
    if not layers:  # a network of the user's that freezes in its own way
        return
    for layer in layers:
        layer.statistics = None
    recalibrate(model, list(train.subset(_EXAMPLES, seed=0).x.split(_BATCH)))
    for layer in layers:
        layer.statistics = Frozen()
