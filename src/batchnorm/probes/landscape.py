"""The loss landscape along the gradient ([P2] Figure 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Landscape"]


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())


class Landscape(Probe):
    """Loss variation, gradient predictiveness and effective β-smoothness.

    With g = ∇L(θ_t) on the step's batch and η from a range of multiples of the learning rate:

    - loss: smallest and largest L(θ − ηg);
    - gradient: smallest and largest ‖∇L(θ) − ∇L(θ − ηg)‖₂;
    - smoothness: largest ‖∇L(θ) − ∇L(θ − ηg)‖₂ / ‖ηg‖₂.

    [P2] leaves open how many η it tried and on which batch: here they are spaced evenly on a log
    scale, both ends included, and the batch is the step's own, in training mode. The direction is
    the gradient's whatever the optimizer. ∇L(θ) is the training step's own.

    References:
        [P2] arXiv 1805.11604, Section 3.1 and Figure 4.
    """

    name = "landscape"
    samples = 20

    def __init__(self, points: int = 6, low: float = 0.5, high: float = 4.0) -> None:
        """``points`` step sizes from ``low`` to ``high`` times the learning rate."""
        self.multiples = [float(m) for m in np.geomspace(low, high, points)]

    def cost(self, layers: list[Layer], batch_size: int) -> float:
        """One forward and backward pass a step size."""
        return len(self.multiples)

    def before_update(self, step: Step) -> Iterator[Record]:
        """Five numbers for the whole network."""
        length = _norm(step.gradients)
        losses, changes, smoothness = [], [], []
        # One copy of the weights, which every step size overwrites.
        moved = {name: torch.empty_like(step.parameters[name]) for name in step.gradients}
        for multiple in self.multiples:
            eta = multiple * step.lr
            for name, value in moved.items():
                torch.mul(step.gradients[name], -eta, out=value).add_(step.parameters[name])
            loss, gradients = step.loss_and_gradients(step.parameters | moved, step.gradients)
            change = _norm({n: step.gradients[n] - g for n, g in gradients.items()})
            losses.append(loss)
            changes.append(change)
            smoothness.append(change / (eta * length) if length else float("nan"))
        # numpy's extrema keep NaN: a step into overflow is not a small loss.
        for quantity, value in (
            ("loss_low", np.min(losses)),
            ("loss_high", np.max(losses)),
            ("gradient_low", np.min(changes)),
            ("gradient_high", np.max(changes)),
            ("smoothness", np.max(smoothness)),
        ):
            yield Record(step.number, "", f"landscape/{quantity}", float(value))
