"""Size of the gradients by depth."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Gradients"]


class Gradients(Probe):
    """‖∂L/∂W_i‖₂ of each layer, from the training step's own gradient."""

    name = "gradients"

    def before_update(self, step: Step) -> Iterator[Record]:
        """One norm a layer."""
        for layer in step.layers:
            norm = step.gradients[layer.weight].norm()
            yield Record(step.number, layer.name, "gradient/norm", float(norm))
