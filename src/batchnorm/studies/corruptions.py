"""Test data that are not what the network was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CORRUPTIONS", "corrupted"]


def _noise(x: Tensor) -> Tensor:
    """Gaussian noise of standard deviation 0.3."""
    generator = torch.Generator().manual_seed(0)
    return x + 0.3 * torch.randn(x.shape, generator=generator)


def _contrast(x: Tensor) -> Tensor:
    """Each example at 0.3 of its distance from its own mean."""
    mean = x.mean(dim=tuple(range(1, x.dim())), keepdim=True)
    return mean + 0.3 * (x - mean)


def _brightness(x: Tensor) -> Tensor:
    """0.3 added."""
    return x + 0.3


def _blur(x: Tensor) -> Tensor:
    """The mean of 3×3 pixels, those beyond the edge being as the edge."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": _noise,
    "contrast": _contrast,
    "brightness": _brightness,
    "blur": _blur,
}
"""Name → what is done to inputs (n, …) between 0 and 1."""


def corrupted(x: Tensor) -> dict[str, Tensor]:
    """The inputs (n, …) under each corruption that they can have: only images can be blurred.

    The smallest and the largest of all values count as 0 and 1, and nothing leaves that range.
    """
    low, high = x.min(), x.max()
    unit = (x - low) / (high - low)
    return {
        name: change(unit).clamp(0, 1) * (high - low) + low
        for name, change in CORRUPTIONS.items()
        if name != "blur" or x.dim() == 4
    }
