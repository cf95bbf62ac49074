"""What a batch norm does after normalising: nothing, or an activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn import batchnorm as ours
from batchnorm.transforms.calls import tolerance

__all__ = ["tail"]

_PLAIN = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
_OURS = {ours.BatchNorm, ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d}
_ACTIVATIONS: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}


def tail(layer: _BatchNorm, x: Tensor, y: Tensor) -> nn.Module | None:
    """Return what a layer that gave y for x does after normalising, or None if that is unclear.

    Of a subclass it is its children one after the other, as in timm's, if that accounts for y.
    """
    if type(layer) in _PLAIN:
        return nn.Identity()
    if type(layer) in _OURS:
        return _ACTIVATIONS[layer.activation]()  # type: ignore[index]
    if layer.running_mean is None or layer.training:
        return None
    after = nn.Sequential(*layer.children()).eval() if len(layer._modules) else nn.Identity()
    plain = F.batch_norm(
        *(x, layer.running_mean, layer.running_var, layer.weight, layer.bias), eps=layer.eps
    )
    guess = after(plain)
    near = tolerance(x)
    same = guess.shape == y.shape and torch.allclose(
        guess, y, rtol=0, atol=near * float(y.abs().max())
    )
    return after if same else None
