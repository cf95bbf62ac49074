"""Loss and accuracy on the training and the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record
from batchnorm.transforms.dataflow import preserved

__all__ = ["BatchLoss", "Performance"]

_CHUNK = 500


class BatchLoss(Probe):
    """The loss that training itself sees; it costs nothing."""

    name = "loss"
    samples = 200

    def before_update(self, step: Step) -> Iterator[Record]:
        """One number."""
        yield Record(step.number, "", "batch/loss", step.loss)


class Performance(Probe):
    """Mean loss an example, and accuracy, in evaluation mode on fixed sets."""

    name = "performance"
    samples = 40

    def __init__(
        self,
        sets: Mapping[str, tuple[Tensor, Tensor]],
        loss_function: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """``sets`` are named (x, y) pairs; integer y are classes."""
        self.sets = sets
        self.loss_function = loss_function

    def cost(self, layers: list[Layer], batch_size: int) -> float:
        """A forward pass is about a third of a step, and larger batches make it cheaper."""
        return sum(len(x) for x, _ in self.sets.values()) / (4 * batch_size)

    def before_update(self, step: Step) -> Iterator[Record]:
        """A loss and an accuracy for each set."""
        with preserved(step.model), torch.no_grad():
            step.model.eval()
            for name, (x, y) in self.sets.items():
                outputs = torch.cat([step.model(chunk) for chunk in x.split(_CHUNK)])
                if y.is_floating_point():
                    loss = float(self.loss_function(outputs, y)) / len(y)
                else:
                    loss = float(self.loss_function(outputs, y))
                    right = (outputs.argmax(1) == y).float().mean()
                    yield Record(step.number, "", f"{name}/accuracy", float(right))
                yield Record(step.number, "", f"{name}/loss", loss)
