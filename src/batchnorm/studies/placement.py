"""Where the normalisation of a layer stands: before its nonlinearity, or behind it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.transforms.dataflow import LINEAR_TYPES

__all__ = ["place_norms"]

_PLACED = ("mlp", "cnn", "vgg")
"""Networks that are one layer after the other; a residual block adds what its norms give."""


def place_norms(model: nn.Module, settings: CellSettings) -> nn.Module:
    """The network with its norms where ``placement`` asks for them; it comes as BN(Wu) → g.

    Behind the nonlinearity, BN(g(Wu + b)), the bias moves the nonlinearity's input, so that every
    linear operation has one ([P1] Section 3.2 leaves it out before batch norm only). Parameters
    keep their names.

    Raises:
        SettingsError: this network's norms cannot be moved.
    """
    if settings.placement != "after":
        return model
    if settings.model not in _PLACED:
        raise SettingsError(
            f"placement='after': the norms of model={settings.model!r} cannot be moved. "
            f"Choose model {', '.join(_PLACED[:-1])} or {_PLACED[-1]}, or leave it out."
        )
    parts = dict(model.named_children())
    placed: OrderedDict[str, nn.Module] = OrderedDict()
    for name, part in parts.items():
        if (norm := f"{name}_norm") in parts:
            for own in (name, f"{name}_activation", norm):
                placed[own] = parts[own]
        elif name not in placed:
            placed[name] = part
        if isinstance(part, LINEAR_TYPES) and part.bias is None:
            part.bias = nn.Parameter(torch.zeros(len(part.weight)))
    return nn.Sequential(placed)
