"""Other choices of what batch normalization normalises by, built of the ops."""

import torch
from torch import Tensor

from batchnorm.ops.autograd import training_forward
from batchnorm.ops.reference import (
    STATISTICS_DTYPE,
    compute_dtype,
    dense,
    laid_out_as,
    merge,
    per_channel,
    reduction_axes,
)


def ghost_forward(
    x: Tensor,
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each group of ``size`` samples by its own moments: y, and mean and var of all.

    A remainder joins the last group.
    """
    samples, channels = x.shape[:2]
    groups = samples // size

    def normalize(part: slice, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        # Channels are independent: G groups of C channels are one batch of G·C channels.
        def fold(t: Tensor) -> Tensor:
            return torch.unflatten(t[part], 0, (groups, -1)).transpose(0, 1).flatten(1, 2)

        y, mean, var, _ = training_forward(
            fold(x),
            None if weight is None else weight.repeat(groups),
            None if bias is None else bias.repeat(groups),
            None if residual is None else fold(residual),
            eps,
            activation,
        )
        y = torch.unflatten(y, 1, (groups, channels)).transpose(0, 1).flatten(0, 1)
        return y, mean.view(groups, channels), var.view(groups, channels)

    if samples % size == 0:
        y, means, variances = normalize(slice(None), groups)
        share = means.new_full((groups, 1), 1 / groups)
    else:
        # All but the last group are of one size, and the last, longer one is another.
        split = (groups - 1) * size
        parts = [normalize(slice(split, None), 1)]
        if groups > 1:
            parts.insert(0, normalize(slice(split), groups - 1))
        y, means, variances = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        share = means.new_full((groups, 1), size / samples)
        share[-1] = (samples - split) / samples
    return laid_out_as(y, dense(x)), *merge(means, variances, share)


def renorm_correction(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    r_max: float | Tensor,
    d_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return r and d, constants, with which x̂·r + d is nearly normalised by the running ones."""
    with torch.no_grad():
        r_max = torch.as_tensor(r_max, dtype=mean.dtype, device=mean.device)
        d_max = torch.as_tensor(d_max, dtype=mean.dtype, device=mean.device)
        sigma = (running_var.to(mean.dtype) + eps).sqrt()
        r = torch.clamp((var + eps).sqrt() / sigma, 1 / r_max, r_max)
        d = torch.clamp((mean - running_mean) / sigma, -d_max, d_max)
    return r, d


def lp_power(
    x: Tensor, mean: Tensor, p: float, central: bool, mask: Tensor | None, n: int | Tensor
) -> Tensor:
    """Return (mean|v|^p)^(2/p) of each channel, v being x or x − mean: the square of a scale."""
    v = x.to(compute_dtype(x))
    if central:
        v = v - per_channel(mean.to(v.dtype), x)
    if mask is not None:
        v = torch.where(mask.unsqueeze(1), v, 0.0)
    norm: Tensor = torch.linalg.vector_norm(v, p, reduction_axes(x), dtype=STATISTICS_DTYPE)
    square: Tensor = norm.square() / n ** (2 / p)
    return square
