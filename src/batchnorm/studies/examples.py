"""A set of examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Examples", "choose"]


def choose(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """A fixed random choice of at most ``limit`` of ``count`` indices, in ascending order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[:limit])


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, kept in memory.

    ``x`` is (n, …) float32; ``y`` is (n,) int64 for classes or (n, k) float32.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def subset(self, limit: int | None, seed: int) -> Examples:
        """A fixed random choice of at most ``limit`` examples."""
        chosen = choose(len(self), limit, seed)
        return Examples(self.x[chosen], self.y[chosen])
