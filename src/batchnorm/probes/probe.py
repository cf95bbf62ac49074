"""What a probe is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from batchnorm.probes.layers import Layer
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Probe"]


class Probe:
    """One measurement, made at some steps of a training run.

    A probe reads a :class:`~batchnorm.probes.step.Step` and yields records. It never changes the
    model, the optimizer or the random state: weights after N steps are bitwise the same with all
    probes and with none.
    """

    name: ClassVar[str]
    samples: ClassVar[int] = 50
    """How often it measures in a run, unless told otherwise: the dearer, the rarer."""

    every: int = 1
    """Steps between two measurements."""

    def cost(self, layers: list[Layer], batch_size: int) -> float:
        """Cost of one measurement in training steps, as far as it counts."""
        return 0.0

    def modules(self, model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
        """Modules whose input and output it wants to see in the training step's forward pass."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What one measurement leaves to the next: tensors and plain values, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; called only where that was not empty."""
        raise NotImplementedError

    def before_update(self, step: Step) -> Iterator[Record]:
        """Measure at θ_t, with its gradients at hand."""
        yield from ()

    def after_update(self, step: Step) -> Iterator[Record]:
        """Measure once θ_{t+1} is known."""
        yield from ()
