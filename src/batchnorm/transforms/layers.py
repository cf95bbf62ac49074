"""Which layers of a network are meant."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

__all__ = ["batch_norms", "matching", "require_finite", "statistics_finite"]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every batch norm by its (first) name: torch's, ours, and their subclasses.

    Raises:
        ValueError: there is none, or one has yet to learn its number of channels.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        others = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
        instead = f"; it has {', '.join(others)}, which keep no statistics" if others else ""
        raise ValueError(f"{type(model).__name__} has no batch norm{instead}: nothing to do")
    for name, layer in layers.items():
        if any(map(is_lazy, (*layer.parameters(), *layer.buffers()))):
            raise ValueError(
                f"{name or 'the layer'} has not seen its first input yet and has no statistics; "
                "run a batch through the network first"
            )
    return layers


def statistics_finite(layer: _BatchNorm) -> bool:
    """Tell whether the running statistics can be used, or there are none."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return True
    return bool(mean.isfinite().all() and var.isfinite().all() and (var >= 0).all())


def require_finite(layers: Mapping[str, _BatchNorm]) -> None:
    """Refuse running statistics that nothing can be made of.

    Raises:
        ValueError: some are not finite, or a variance is negative; the message names the layers.
    """
    odd = [name or "the layer" for name, layer in layers.items() if not statistics_finite(layer)]
    if odd:
        raise ValueError(
            f"the running statistics of {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''} are "
            "not finite, or a variance is negative; recalibrate() measures them again"
        )


def matching(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, _BatchNorm]:
    """Return the batch norms whose name one of the patterns matches; all without a pattern.

    Raises:
        ValueError: a pattern matches none; the message has the nearest names.
    """
    layers = batch_norms(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            near = get_close_matches(pattern, layers, cutoff=0) or list(layers)
            raise ValueError(
                f"{pattern!r} is the name of no batch norm; near it are {', '.join(near)} "
                "(* stands for any text)"
            )
    return {
        name: layer
        for name, layer in layers.items()
        if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
