"""Which examples each step sees."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batches"]


class Batches:
    """Shuffled epochs without replacement, as a function of (seed, step) alone.

    There is no state to save: a resumed run and the other arm of the pair ask for step t and get
    the same batch. What is left of an epoch after the last whole batch is dropped, so that every
    batch has the same size.
    """

    def __init__(self, examples: int, batch_size: int, seed: int, *, once: bool = False) -> None:
        """Batches of ``batch_size`` of ``examples``; ``once``: the same ones in every epoch."""
        self.examples, self.batch_size, self.seed, self.once = examples, batch_size, seed, once
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Tensor:
        """Indices of the examples of one step."""
        epoch, position = divmod(step, self.examples // self.batch_size)
        epoch = 0 if self.once else epoch
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, torch.from_numpy(random.permutation(self.examples))
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]
