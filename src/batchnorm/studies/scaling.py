"""Input scaling: the first thing that decides how fast a network learns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchnorm.studies.settings import Scaling

__all__ = ["scale"]


def _standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    # Images a channel at a time: their pixels share a unit, and many never vary.
    axes = (0, 2, 3) if train.dim() == 4 else (0,)
    double = train.double()
    mean = double.mean(axes, keepdim=True)
    std = double.std(axes, correction=0, keepdim=True)
    std[std == 0] = 1.0  # a constant feature becomes 0
    return ((double - mean) / std).float(), ((test.double() - mean) / std).float()


def scale(scaling: Scaling, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Scale inputs by what the training set says.

    - ``raw``: as the data are;
    - ``unit``: divided by the largest absolute value;
    - ``binary``: 1 above half of the largest value, else 0, as in [P1] Section 4.1;
    - ``standardize``: mean 0 and variance 1, for each feature of a vector or channel of an image;
    - ``skewed``: standardised, then feature j multiplied by a factor between 0.1 and 10, evenly
      spaced on a log scale and in a fixed random order. The condition number of the input
      covariance grows by up to 10⁴: gradient descent crawls along the small features at any
      learning rate that the large ones allow.

    Args:
        scaling: one of the names above.
        train: training inputs (n, …).
        test: test inputs, scaled by the same numbers.
    """
    if scaling == "raw":
        return train, test
    if scaling in ("unit", "binary"):
        largest = train.abs().max().clamp(min=torch.finfo(train.dtype).tiny)
        train, test = train / largest, test / largest
        if scaling == "binary":
            train, test = (train > 0.5).float(), (test > 0.5).float()
        return train, test
    train, test = _standardize(train, test)
    if scaling == "skewed":
        shape = train.shape[1:]
        factors = np.logspace(-1, 1, shape.numel())[
            np.random.default_rng(0).permutation(shape.numel())
        ]
        factor = torch.tensor(factors, dtype=train.dtype).reshape(shape)
        train, test = train * factor, test * factor
    return train, test
