"""The normalisations that an arm of a study can have, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.noise import Noise, Noisy
from batchnorm.nn.statistics import Frozen, Ghost, Lp, Ramp, Renorm, Statistics

__all__ = ["NORMS", "make_norm", "makes_bias_redundant"]

_Factory = Callable[[int, int], nn.Module]


def _batch(statistics: Statistics | None = None) -> _Factory:
    layers = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
    return lambda channels, rank: layers[rank](channels, statistics=statistics)


def _layer(channels: int, rank: int) -> nn.Module:
    # Over channels and positions, as group norm with one group; for vectors that is layer norm.
    return nn.GroupNorm(1, channels)


def _group(channels: int, rank: int) -> nn.Module:
    # 32 groups (arXiv 1803.08494, Table 3) or the nearest number that divides the channels,
    # never one channel a group: for vectors that would be a constant.
    groups = math.gcd(channels, 32)
    return nn.GroupNorm(groups if groups < channels else max(1, groups // 2), channels)


_GHOSTS = (2, 4, 8, 16, 32)

NORMS: dict[str, _Factory] = {
    "none": lambda channels, rank: nn.Identity(),
    "batch": _batch(),
    "layer": _layer,
    "group": _group,
    # [P2] Section 3.3: centred as batch norm, scaled by the raw moment of order p.
    "l1": _batch(Lp(1)),
    "l2": _batch(Lp(2)),
    "linf": _batch(Lp(math.inf)),
    # [P2] Section 2.2: batch norm with noise behind it, and the same noise on its own.
    "noisy": _batch(Noisy()),
    "noise": lambda channels, rank: Noise(),
    **{f"ghost{size}": _batch(Ghost(size)) for size in _GHOSTS},
    # The ramp of arXiv 1702.03275, 50 times as steep: our runs are that much shorter.
    "renorm": _batch(Renorm(schedule=Ramp(start=100, r_end=800, d_end=500))),
    # 0 and 1 until someone measures them; arms of a study have them measured before training.
    "frozen": _batch(Frozen()),
}
"""Name → factory of (channels, number of spatial dimensions). Studies add theirs."""

_CENTRING = ("batch", "noisy", "renorm", *(f"ghost{size}" for size in _GHOSTS))


def makes_bias_redundant(name: str) -> bool:
    """Whether the normalisation takes a bias before it away entirely ([P1] Section 3.2).

    The raw moments of ``l1``, ``l2`` and ``linf`` feel the mean, so that a bias acts on the scale,
    and the statistics of ``frozen`` do not follow it. ``renorm`` gives it no gradient.
    """
    return name in _CENTRING


def make_norm(name: str, channels: int, rank: int) -> nn.Module:
    """Make the normalisation ``name`` for ``channels`` and ``rank`` spatial dimensions (0–3).

    Raises:
        KeyError: no such normalisation; the message names those there are.
    """
    if name not in NORMS:
        raise KeyError(f"norm={name!r} is not one of {', '.join(NORMS)}")
    return NORMS[name](channels, rank)
