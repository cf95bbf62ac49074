"""The scale γ that batch norms have learned."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Gamma"]


class Gamma(Probe):
    """Root mean square of γ over the channels of each batch norm that has it."""

    name = "gamma"

    def __init__(self, every: int) -> None:
        """Measure once in ``every`` steps."""
        self.every = every

    def before_update(self, step: Step) -> Iterator[Record]:
        """One number a batch norm, under the name of the layer that it normalises."""
        behind = {layer.site: layer.name for layer in step.layers}
        for name, module in step.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                rms = float(module.weight.detach().double().square().mean().sqrt())
                yield Record(step.number, behind.get(module, name), "gamma/rms", rms)
