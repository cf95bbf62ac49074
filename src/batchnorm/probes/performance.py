"""Loss and accuracy on the training and the test set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record
from batchnorm.transforms.dataflow import preserved

__all__ = ["BatchLoss", "Performance", "evaluate", "scores"]

_CHUNK = 500

Loss = Callable[[Tensor, Tensor], Tensor]


def scores(outputs: Tensor, y: Tensor, loss_function: Loss) -> dict[str, float]:
    """The mean loss an example and, where ``y`` are classes, the ``accuracy``."""
    if y.is_floating_point():
        return {"loss": float(loss_function(outputs, y)) / len(y)}
    right = (outputs.argmax(1) == y).float().mean()
    return {"accuracy": float(right), "loss": float(loss_function(outputs, y))}


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, loss_function: Loss) -> dict[str, float]:
    """The :func:`scores` of a network in evaluation mode; its modes are left as they were."""
    with preserved(model):
        model.eval()
        outputs = torch.cat([model(chunk) for chunk in x.split(_CHUNK)])
    return scores(outputs, y, loss_function)


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
        loss_function: Loss,
    ) -> None:
        """``sets`` are named (x, y) pairs; integer y are classes."""
        self.sets = sets
        self.loss_function = loss_function

    def cost(self, layers: list[Layer], batch_size: int) -> float:
        """A forward pass is about a third of a step, and larger batches make it cheaper."""
        return sum(len(x) for x, _ in self.sets.values()) / (4 * batch_size)

    def before_update(self, step: Step) -> Iterator[Record]:
        """A loss and an accuracy for each set."""
        for name, (x, y) in self.sets.items():
            for what, value in evaluate(step.model, x, y, self.loss_function).items():
                yield Record(step.number, "", f"{name}/{what}", value)
