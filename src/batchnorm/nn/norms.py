"""The normalisations that an arm of a study can have, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["NORMS", "make_norm"]


def _batch(channels: int, rank: int) -> nn.Module:
    return (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)[rank](channels)


def _layer(channels: int, rank: int) -> nn.Module:
    # Over channels and positions, as group norm with one group; for vectors that is layer norm.
    return nn.GroupNorm(1, channels)


def _group(channels: int, rank: int) -> nn.Module:
    # 32 groups (arXiv 1803.08494, Table 3) or the nearest number that divides the channels,
    # never one channel a group: for vectors that would be a constant.
    groups = math.gcd(channels, 32)
    return nn.GroupNorm(groups if groups < channels else max(1, groups // 2), channels)


NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, rank: nn.Identity(),
    "batch": _batch,
    "layer": _layer,
    "group": _group,
}
"""Name → factory of (channels, number of spatial dimensions). Studies add theirs."""


def make_norm(name: str, channels: int, rank: int) -> nn.Module:
    """Make the normalisation ``name`` for ``channels`` and ``rank`` spatial dimensions (0–3).

    Raises:
        KeyError: no such normalisation; the message names those there are.
    """
    if name not in NORMS:
        raise KeyError(f"norm={name!r} is not one of {', '.join(NORMS)}")
    return NORMS[name](channels, rank)
