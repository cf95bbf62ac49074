"""Take over batch norms from frameworks with other conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.transforms.layers import batch_norms

__all__ = ["CONVENTIONS", "import_statistics"]


class _Convention(NamedTuple):
    names: dict[str, str]
    momentum: float
    eps: float


CONVENTIONS = {
    "keras": _Convention(
        {
            "gamma": "weight",
            "beta": "bias",
            "moving_mean": "running_mean",
            "moving_variance": "running_var",
        },
        momentum=0.99,
        eps=1e-3,
    ),
    "flax": _Convention(
        {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
        momentum=0.99,
        eps=1e-5,
    ),
}
"""What arrays are called, and the defaults of momentum and ε."""


def import_statistics(
    model: nn.Module,
    source: Mapping[str, Mapping[str, Any]],
    *,
    convention: str,
    momentum: float | None = None,
    eps: float | None = None,
    values: int | None = None,
) -> None:
    r"""Set batch norms to the arrays and the conventions of Keras or Flax.

    There momentum m is the weight of what is kept, here of what is new, and there the variance
    that is tracked is the biased one:

    .. math::

        \mathrm{momentum} = 1 - m, \qquad
        \bar\sigma^2 = \tfrac{n}{n-1}\,\bar\sigma^2_{\mathrm{biased}}

    The second would change what evaluation computes, so that it is left out unless ``values`` is
    given: then the running variance is what training here would have tracked.

    Args:
        model: The network, changed in place.
        source: For each batch norm to set, by its name here, its arrays by their names there:
            ``gamma, beta, moving_mean, moving_variance`` or ``scale, bias, mean, var``, of
            shape (C,), of any kind that torch takes. Without γ or β these are 1 and 0.
        convention: ``"keras"`` or ``"flax"``.
        momentum: As it was there. Default: 0.99, as in both.
        eps: ε. Default: Keras's 1e-3, Flax's 1e-5.
        values: n, how many values of each channel a batch had there: N·H·W.

    Raises:
        ValueError: A name is unknown, an array is missing, of another shape, not finite or a
            negative variance, or the layer has no place for it. Nothing is changed then.

    Example:
        >>> import batchnorm
        >>> layer = batchnorm.BatchNorm1d(1)
        >>> arrays = {"gamma": [2.0], "beta": [1.0], "moving_mean": [3.0], "moving_variance": [4.0]}
        >>> import_statistics(layer, {"": arrays}, convention="keras", momentum=0.9)
        >>> layer.running_var.item(), round(layer.momentum, 3), layer.eps
        (4.0, 0.1, 0.001)
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    names, m, default_eps = CONVENTIONS[convention]
    m = m if momentum is None else momentum
    if not 0 <= m <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {m}")
    if values is not None and values < 2:
        raise ValueError(f"values must be 2 or more, got {values}: of one there is no variance")
    layers = batch_norms(model)
    writes: list[tuple[Tensor, Tensor]] = []
    for name, arrays in source.items():
        if name not in layers:
            raise ValueError(f"{name!r} is no batch norm; there are {', '.join(layers)}")
        writes += _writes(name, layers[name], arrays, names, values)
    with torch.no_grad():
        for target, value in writes:
            target.copy_(value)
    for name in source:
        layers[name].momentum = 1 - m
        layers[name].eps = default_eps if eps is None else eps


def _writes(
    name: str,
    layer: _BatchNorm,
    arrays: Mapping[str, Any],
    names: dict[str, str],
    values: int | None,
) -> list[tuple[Tensor, Tensor]]:
    called = name or "the layer"
    unknown = set(arrays) - set(names)
    if unknown:
        raise ValueError(f"{called}: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    writes = []
    for theirs, ours in names.items():
        target = getattr(layer, ours)
        value = arrays.get(theirs)
        if value is None and ours.startswith("running"):
            raise ValueError(f"{called}: {theirs} is missing")
        if target is None:
            if value is not None:
                raise ValueError(f"{called} has no {ours} to hold {theirs}; make it with one")
            continue
        if value is None:
            value = torch.full_like(target, 1.0 if ours == "weight" else 0.0)
        value = torch.as_tensor(value, dtype=torch.float64)
        if value.shape != target.shape:
            raise ValueError(
                f"{called}: {theirs} has shape {tuple(value.shape)}, {ours} {tuple(target.shape)}"
            )
        if not value.isfinite().all() or (ours == "running_var" and (value < 0).any()):
            raise ValueError(f"{called}: {theirs} is not finite, or a negative variance")
        if ours == "running_var" and values is not None:
            value = value * (values / (values - 1))
        writes.append((target, value))
    return writes
