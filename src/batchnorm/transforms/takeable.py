"""What a layer of ours can do in the pass in which it normalises, as others write it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from batchnorm.functional import ACTIVATIONS
from batchnorm.nn import batchnorm as ours
from batchnorm.ops.reference import LEAKY_SLOPE

__all__ = [
    "ACTIVATION_MODULES",
    "activation_of",
    "activation_of_function",
    "add_and_activate",
    "adds_in_place",
    "fits",
    "is_sum",
]

ACTIVATION_MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.ReLU: ("relu", {}),
    nn.ReLU6: ("relu6", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": LEAKY_SLOPE}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    nn.Hardswish: ("hardswish", {}),
}
"""The module of each activation that the layer has, with the options that it needs to have."""

_FUNCTIONS = {
    getattr(place, form): name
    for name in ACTIVATIONS
    for form in (name, f"{name}_")
    for place in (torch, F, Tensor, torch._C._nn)
    if hasattr(place, form)
}
_METHODS = {form: name for name in ACTIVATIONS for form in (name, f"{name}_")}
_SUMS = {
    ("call_function", operator.add): False,
    ("call_function", operator.iadd): True,
    ("call_function", torch.add): False,
    ("call_function", Tensor.add): False,
    ("call_function", Tensor.add_): True,
    ("call_method", "add"): False,
    ("call_method", "add_"): True,
}
"""Whether a sum is written where its first operand is."""


def activation_of(module: nn.Module) -> str | None:
    """Return which activation of the layer's a module is, if any."""
    name, options = ACTIVATION_MODULES.get(type(module), (None, {}))
    same = all(getattr(module, option) == value for option, value in options.items())
    return name if same else None


def activation_of_function(node: fx.Node) -> str | None:
    """Return which activation of the layer's a call of a function or a method is, if any."""
    table = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
    name = table.get(node.target)
    options = [*node.args[1:2], *node.kwargs.values()]
    if name == "leaky_relu":
        slope = node.kwargs.get("negative_slope", (*node.args[1:2], LEAKY_SLOPE)[0])
        return name if slope == LEAKY_SLOPE else None
    if name == "gelu":
        return name if all(option == "none" for option in options) else None
    return name


def is_sum(node: fx.Node) -> bool:
    """Tell whether a node is a sum of two operands."""
    return (node.op, node.target) in _SUMS


def adds_in_place(node: fx.Node) -> bool:
    """Tell whether a sum is written where its first operand is."""
    return _SUMS[node.op, node.target]


def add_and_activate(
    layer: ours._BatchNorm, x: Tensor, residual: Any, activation: str | None, in_place: bool
) -> Tensor:
    """Return act(layer(x) + residual): in one pass, if the residual is of the shape of x."""
    if fits(x, residual):
        return layer(x, residual, activation=activation)  # type: ignore[no-any-return]
    y: Tensor = layer(x)
    y = y.add_(residual) if in_place else y + residual
    return y if activation is None else getattr(F, activation)(y)


def fits(x: Tensor, residual: Any) -> bool:
    """Tell whether a residual can be added in the pass that normalises x."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
