"""Photometric distortion of training images: brightness and contrast."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.studies.tasks import Task

__all__ = ["Distortion", "make_distortion"]

_STREAM = 1
"""Keeps the random numbers of a step apart from those that shuffle an epoch."""


class Distortion:
    """x ↦ x̄ + (1 + c)(x − x̄) + b·s for each image of a batch, x̄ being the image's mean.

    c (contrast) and b (brightness) are uniform in [−a, a], a being the amount and s the standard
    deviation of all training images. They are a function of (seed, step), as
    :class:`~batchnorm.studies.batches.Batches` are: there is no state to save, and every arm sees
    the same images.
    """

    def __init__(self, amount: float, seed: int, images: Tensor) -> None:
        """Distort by ``amount``; ``images`` (n, channels, height, width) give the unit s."""
        self.amount, self.seed = amount, seed
        self.unit = float(images.std())

    def __call__(self, step: int, x: Tensor) -> Tensor:
        """The images of one step, distorted."""
        random = np.random.default_rng([self.seed, step, _STREAM])
        drawn = random.uniform(-self.amount, self.amount, (2, len(x), 1, 1, 1))
        contrast, brightness = torch.from_numpy(drawn).to(x.dtype)
        mean = x.mean((1, 2, 3), keepdim=True)
        distorted: Tensor = mean + (1 + contrast) * (x - mean) + brightness * self.unit
        return distorted


def make_distortion(settings: CellSettings, task: Task) -> Distortion | None:
    """The distortion that a cell's settings ask for.

    Raises:
        SettingsError: the task has no images.
    """
    if not settings.distortion:
        return None
    if len(task.shape) != 3:
        raise SettingsError(
            f"distortion={settings.distortion}: task {task.name!r} has inputs of shape "
            f"{'×'.join(map(str, task.shape))}, not images (channels, height, width). Give 0."
        )
    return Distortion(settings.distortion, settings.seed, task.train.x)
