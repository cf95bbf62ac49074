"""Distribution of the inputs of the nonlinearities ([P1] Figure 1(b, c))."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["BINS", "UNIT", "Activations", "histogram"]

BINS = 32
UNIT = 0
"""Whose percentiles are taken: [P1] shows one sigmoid of the last hidden layer."""

_PERCENTILES = {"p15": 0.15, "p50": 0.50, "p85": 0.85}


def histogram(values: Tensor) -> tuple[Tensor, float, float]:
    """Share of the values in :data:`BINS` equal bins, with the outer edges."""
    low, high = float(values.min()), float(values.max())
    if not low < high:  # one value only: give it a bin of its own
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, BINS, low, high)
    return counts / values.numel(), low, high


class Activations(Probe):
    """Moments and a histogram of each layer, and {15, 50, 85}th percentiles of one unit."""

    name = "activations"
    samples = 25

    def modules(self, model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
        """The output of each layer's normalisation, or of the layer where it has none."""
        return [layer.site for layer in layers]

    def before_update(self, step: Step) -> Iterator[Record]:
        """Over the batch that the training step itself saw."""
        for layer in step.layers:
            values = step.seen[layer.site].output.float()
            if not torch.isfinite(values).all():
                continue
            unit = values[..., UNIT] if values.dim() == 2 else values[:, UNIT]
            measured = {"mean": values.mean(), "std": values.std(correction=0)}
            levels = torch.tensor(list(_PERCENTILES.values()), dtype=values.dtype)
            measured |= dict(zip(_PERCENTILES, unit.flatten().quantile(levels), strict=True))
            shares, low, high = histogram(values)
            for name, value in measured.items():
                yield Record(step.number, layer.name, f"activation/{name}", float(value))
            yield Record(step.number, layer.name, "activation/low", low)
            yield Record(step.number, layer.name, "activation/high", high)
            for index, share in enumerate(shares.tolist()):
                yield Record(step.number, layer.name, "activation/histogram", share, index)
