"""Internal covariate shift as [P2] defines it."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import functional as F

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Shift"]


class Shift(Probe):
    """How much the gradient of a layer changes because the layers before it were updated.

    For layer i, G_i = ∇_{W_i} L(W_1^t, …, W_k^t) and
    G'_i = ∇_{W_i} L(W_1^{t+1}, …, W_{i−1}^{t+1}, W_i^t, …, W_k^t), on the same batch; reported are
    ‖G_i − G'_i‖₂ and cos∠(G_i, G'_i). W_1…W_{i−1} stand for *all* parameters of the earlier
    layers, γ and β included. Where either gradient is zero the angle is not defined (NaN).

    References:
        [P2] arXiv 1805.11604, Definition 2.1.
    """

    name = "shift"
    samples = 20

    def cost(self, layers: list[Layer], batch_size: int) -> float:
        """One forward and backward pass a layer but the first, whose G' is G."""
        return len(layers) - 1

    def after_update(self, step: Step) -> Iterator[Record]:
        """One pair of numbers a layer."""
        mixed = dict(step.parameters)
        for number, layer in enumerate(step.layers):
            before = step.gradients[layer.weight]
            after = before
            if number:
                _, gradients = step.loss_and_gradients(mixed, [layer.weight])
                after = gradients[layer.weight]
            norms = before.norm() * after.norm()
            cosine = (
                float(F.cosine_similarity(before.flatten(), after.flatten(), 0, eps=0))
                if norms > 0
                else float("nan")
            )
            yield Record(step.number, layer.name, "shift/l2", float((before - after).norm()))
            yield Record(step.number, layer.name, "shift/cosine", cosine)
            mixed |= {name: step.updated[name] for name in layer.parameters}
