"""Shape of the distributions on both sides of the linear operations ([P1] Section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from batchnorm.probes.layers import Layer
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record

__all__ = ["Shape", "moments"]


def moments(values: Tensor) -> tuple[float, float]:
    """Mean over the units of |skewness| and of |excess kurtosis|, both 0 for a Gaussian.

    With z = (x − mean)/std over batch and positions they are |E z³| and |E z⁴ − 3|. Units that do
    not vary are left out; NaN where none does.

    Args:
        values: (examples, units) or (examples, units, …).

    Example:
        >>> from torch import tensor
        >>> moments(tensor([[-1.0], [1.0]]))  # a fair coin: E z⁴ = 1
        (0.0, 2.0)
    """
    x = values.double().transpose(0, 1).flatten(1)
    x = x[x.amax(1) > x.amin(1)]
    if not len(x):
        return math.nan, math.nan
    z = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    return float(z.pow(3).mean(1).abs().mean()), float((z.pow(4).mean(1) - 3).abs().mean())


class Shape(Probe):
    """Skewness, excess kurtosis and share of zeros of a layer's input u and output Wu + b.

    The output is taken before any normalisation. All three stay as they are when a unit's mean
    and variance are changed, the zeros by a change of variance only.
    """

    name = "shape"

    def __init__(self, every: int) -> None:
        """Measure once in ``every`` steps."""
        self.every = every

    def modules(self, model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
        """The linear operations."""
        return [model.get_submodule(layer.name) for layer in layers]

    def before_update(self, step: Step) -> Iterator[Record]:
        """Six numbers a layer, over the batch that the training step itself saw."""
        for layer in step.layers:
            seen = step.seen[step.model.get_submodule(layer.name)]
            for side, values in (("input", seen.input), ("output", seen.output)):
                skewness, kurtosis = moments(values)
                measured = {
                    "skewness": skewness,
                    "kurtosis": kurtosis,
                    "zeros": float((values == 0).double().mean()),
                }
                for name, value in measured.items():
                    yield Record(step.number, layer.name, f"shape/{side}_{name}", value)
