"""Remove the biases that a batch norm takes out again."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from batchnorm.nn.statistics import Lp
from batchnorm.transforms.calls import (
    Calls,
    behind,
    follow,
    largest_difference,
    reserved,
    tolerance,
)
from batchnorm.transforms.dataflow import preserved
from batchnorm.transforms.layers import batch_norms, require_finite

__all__ = ["Stripping", "strip_bias"]


@dataclass(frozen=True)
class Stripping:
    """What :func:`strip_bias` did."""

    stripped: dict[str, str]
    """Name of the batch norm behind each linear operation that lost its bias, by its name."""
    left: dict[str, str]
    """Why the linear operation before a batch norm kept its bias, by the name of the latter."""
    largest_difference: float
    """By how much the output in evaluation changed on the example, at most, absolutely."""


def strip_bias(model: nn.Module, *example: Any, **named: Any) -> Stripping:
    r"""Remove each bias that the batch norm behind it takes out again.

    .. math:: \mathrm{BN}(Wu + b) = \mathrm{BN}(Wu), \qquad \bar\mu \leftarrow \bar\mu - b

    In training the mean of the batch contains b; in evaluation the running mean does, from which
    it is taken. So the network computes what it did, with fewer parameters, and its statistics
    go on as they would have. An optimiser made before holds biases that nothing uses any more.

    Which linear operation leads where is found as in :func:`fold`.

    Args:
        model: The network, in any mode, changed in place.
        *example: What to call the network with.
        **named: What to call it with by name.

    Returns:
        Which biases are gone, which stayed and why, and how much the output changed.

    Raises:
        ValueError: The network has no batch norm or statistics that are not finite, decides on
            values so that one run does not show what it does, or its output changed by more
            than rounding does. It is as it was then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> strip_bias(model, torch.randn(2, 3, 8, 8)).stripped, model[0].bias
        ({'0': '1'}, None)

    References:
        [P1] Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.2.
    """
    layers = batch_norms(model)
    require_finite(layers)
    names = {module: name for name, module in model.named_modules()}
    with preserved(model):
        model.eval()
        calls = follow(model, example, named, lambda y: None, lambda *_: None)
    stripped, left = {}, {}
    with ExitStack() as undo:
        for name, layer in layers.items():
            module = _redundant(layer, names, calls)
            if isinstance(module, str):
                left[name] = module
            elif module._parameters["bias"] is not None:
                _strip(module, layer, undo)
                stripped[names[module]] = name
        with preserved(model), torch.no_grad():
            model.eval()
            output = [t for t in tree_leaves(model(*example, **named)) if isinstance(t, Tensor)]
        largest, scale = largest_difference(calls.output, output)
        limit = max((tolerance(model.get_submodule(name).weight) for name in stripped), default=0)
        if not largest <= limit * scale:
            raise ValueError(
                f"without its redundant biases the network's output differs by {largest:.1g} "
                f"(largest value {scale:.1g}): it uses its layers otherwise than by calling "
                "them, or is not the same from run to run"
            )
        undo.pop_all()
    return Stripping(stripped, left, largest)


def _redundant(layer: _BatchNorm, names: dict[nn.Module, str], calls: Calls) -> nn.Module | str:
    """Return the linear operation whose bias the layer takes out, or why there is none."""
    if layer not in calls.of:
        return "does not run on the example"
    statistics = getattr(layer, "statistics", None)
    if isinstance(statistics, Lp) and not statistics.central:
        return f"its scale, of {statistics}, feels the mean"
    if reason := reserved(layer, calls):
        return reason
    into = behind(layer, names, calls)
    if isinstance(into, str):
        return into
    if len(into) > 1:
        return f"{', '.join(names[m] for m in into)} share it, whose biases differ"
    return into[0]


def _strip(module: nn.Module, layer: _BatchNorm, undo: ExitStack) -> None:
    bias = module._parameters["bias"]
    assert bias is not None
    undo.callback(module._parameters.__setitem__, "bias", bias)
    module._parameters["bias"] = None
    mean = layer.running_mean
    if mean is not None:
        undo.callback(mean.copy_, mean.clone())
        mean.copy_(mean.double() - bias.detach().double())
