"""Size of the weights and the learning rate that it makes of the nominal one."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Weights"]


class Weights(Probe):
    """‖W_i‖₂ and the effective learning rate η/‖W_i‖² of each layer.

    A weight followed by batch norm acts through its direction alone, and its direction moves at
    η/‖W‖². Without normalisation the number is still recorded but has no such meaning.

    References:
        arXiv 1706.05350, Section 2.
    """

    name = "weights"

    def before_update(self, step: Step) -> Iterator[Record]:
        """Two numbers a layer."""
        for layer in step.layers:
            norm = float(step.parameters[layer.weight].norm())
            yield Record(step.number, layer.name, "weight/norm", norm)
            rate = step.lr / norm**2 if norm else float("inf")
            yield Record(step.number, layer.name, "weight/effective_lr", rate)
