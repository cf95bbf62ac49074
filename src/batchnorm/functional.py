r"""Batch normalization as functions: everything is an argument, nothing is kept.

[P1] is Ioffe & Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift*, 2015, arXiv 1502.03167.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.ops import reference

__all__ = [
    "ACTIVATIONS",
    "Moments",
    "TrainingResult",
    "batch_norm",
    "moments",
    "normalize",
    "update_running",
]

ACTIVATIONS = ops.ACTIVATIONS[1:]
"""The activations that are fused: :func:`torch.nn.functional.relu` and its like."""

_CODES: dict[str | None, int] = {None: 0} | {
    name: ops.ACTIVATIONS.index(name) for name in ACTIVATIONS
}


class Moments(NamedTuple):
    """Mean and biased variance of each channel, float64, and the number of values of each."""

    mean: Tensor
    var: Tensor
    n: int | Tensor


class TrainingResult(NamedTuple):
    """The normalised values and the moments that they were normalised by."""

    y: Tensor
    moments: Moments


def moments(x: Tensor, *, mask: Tensor | None = None) -> Moments:
    r"""Return the mean and the biased variance of each channel over all other axes.

    .. math:: \mu = \frac1n \sum x, \qquad \sigma^2 = \frac1n \sum (x - \mu)^2

    Args:
        x: Values of shape (N, C, \*), floating.
        mask: Booleans of shape (N, \*): only where true is a value counted. Default: all are.

    Returns:
        ``mean`` and ``var`` of shape (C,), float64 whatever the type of ``x`` is, so that neither
        a large mean nor a large variance is rounded away; and ``n``, the number of values.

    Raises:
        ValueError: ``x`` has fewer than two axes or no values, or ``mask`` has another shape.
        TypeError: ``x`` is not floating or ``mask`` not boolean.

    Example:
        >>> import torch
        >>> mean, var, n = moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> mean.tolist(), var.tolist(), n
        ([2.0, 0.0], [1.0, 0.0], 2)

    References:
        [P1] Algorithm 1, lines 1 and 2.
    """
    _check_input(x)
    _check_not_empty(x)
    if mask is not None:
        _check_mask(mask, x)
        mean, var, n = reference.masked_moments(x, mask)
        return Moments(mean, var, n)
    mean, var = ops.moments(x)
    return Moments(mean, var, x.numel() // x.shape[1])


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Normalise by given statistics, then scale, shift, add and activate.

    .. math::

        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    This is batch normalization at inference. It is differentiable in every tensor.

    Args:
        x: Values of shape (N, C, \*), floating; N may be 0.
        mean: μ of shape (C,).
        var: σ² of shape (C,).
        weight: γ of shape (C,). Default: 1.
        bias: β of shape (C,). Default: 0.
        eps: ε, finite and not negative.
        residual: r, of the shape and type of ``x``. Default: 0.
        activation: One of :data:`ACTIVATIONS`. Default: the identity.

    Returns:
        y, of the shape and type of ``x``.

    Raises:
        ValueError: A shape, a device, ``eps`` or ``activation`` is wrong.
        TypeError: A tensor is not floating, or the type of ``residual`` is not that of ``x``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> normalize(x, torch.tensor([1.0, 5.0]), torch.tensor([4.0, 1.0]), eps=0.0)
        tensor([[0., 0.],
                [1., 0.]])

    References:
        [P1] Algorithm 2, line 11.
    """
    _check_input(x)
    _check_vectors(x, mean=mean, var=var, weight=weight, bias=bias)
    _check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if x.numel() == 0:
        return x.clone()
    y: Tensor = ops.normalize(x, mean, var, weight, bias, residual, eps, code)
    return y


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> TrainingResult:
    r"""Normalise by the moments of the batch, then scale, shift, add and activate.

    .. math::

        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    with μ and σ² from :func:`moments`. This is batch normalization in training: gradients flow
    through μ and σ² too. Running statistics are the caller's: update them from the moments.

    Args:
        x: Values of shape (N, C, \*), floating, two or more for each channel.
        weight: γ of shape (C,). Default: 1.
        bias: β of shape (C,). Default: 0.
        eps: ε, finite and not negative.
        residual: r, of the shape and type of ``x``. Default: 0.
        activation: One of :data:`ACTIVATIONS`. Default: the identity.
        mask: Booleans of shape (N, \*): the moments are those of the values where it is true.
            All values are normalised. Default: all are counted.

    Returns:
        y, of the shape and type of ``x``, and the :class:`Moments`, biased and float64.

    Raises:
        ValueError: A shape, a device, ``eps`` or ``activation`` is wrong, or there is only one
            value for each channel, which normalising would turn into β whatever it is.
        TypeError: A tensor is not floating, ``mask`` is not boolean, or the type of ``residual``
            is not that of ``x``.

    Example:
        >>> import torch
        >>> y, (mean, var, n) = batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0)
        >>> y.flatten().tolist(), mean.item(), var.item(), n
        ([-1.0, 1.0], 2.0, 1.0, 2)

    References:
        [P1] Algorithm 1; its backward is that of section 3.
    """
    _check_input(x)
    _check_vectors(x, weight=weight, bias=bias)
    _check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if mask is not None:
        _check_mask(mask, x)
        mean, var, counted = reference.masked_moments(x, mask)
        _check_masked_count(counted)
        y = ops.normalize(x, mean, var, weight, bias, residual, eps, code)
        return TrainingResult(y, Moments(mean, var, counted))
    count = x.numel() // max(x.shape[1], 1)
    _check_count(count, x)
    y, mean, var, _ = ops.training_forward(x, weight, bias, residual, eps, code)
    return TrainingResult(y, Moments(mean, var, count))


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    batch: Moments,
    momentum: float | None = 0.1,
    num_batches: Tensor | None = None,
) -> None:
    r"""Move running statistics towards the moments of a batch, in place.

    .. math::

        \bar\mu \leftarrow (1 - w)\,\bar\mu + w\,\mu, \qquad
        \bar\sigma^2 \leftarrow (1 - w)\,\bar\sigma^2 + w\,\tfrac{n}{n-1}\,\sigma^2

    Args:
        running_mean: :math:`\bar\mu` of shape (C,), float32 or float64.
        running_var: :math:`\bar\sigma^2` of shape (C,), unbiased.
        batch: Moments, as :func:`batch_norm` returns them: biased.
        momentum: w, the weight of the batch. None: 1 over the number of batches.
        num_batches: How many batches there were, one integer; it is raised by 1.

    Example:
        >>> import torch
        >>> mean, var = torch.zeros(1), torch.ones(1)
        >>> update_running(mean, var, moments(torch.tensor([[1.0], [3.0]])), momentum=0.5)
        >>> mean.item(), var.item()
        (1.0, 1.5)

    References:
        [P1] section 3.1 mentions the moving averages; the factor is that of Algorithm 2, line 10.
    """
    ops.update_running(running_mean, running_var, num_batches, *batch, momentum)


def _check_input(x: Tensor) -> None:
    if x.dim() < 2:
        raise ValueError(
            f"x must have two or more axes, (N, C, *), got shape {tuple(x.shape)}; "
            "add the missing axis, for one sample x.unsqueeze(0)"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}; convert it, as by x.float()")


def _check_not_empty(x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(
            f"x has no values to take moments of, its shape is {tuple(x.shape)}; "
            "leave empty batches out of training"
        )


def _check_vectors(x: Tensor, **vectors: Tensor | None) -> None:
    channels = x.shape[1]
    for name, v in vectors.items():
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise ValueError(
                f"{name} must have one value for each of the {channels} channels of x "
                f"(axis 1 of {tuple(x.shape)}), got shape {tuple(v.shape)}"
            )
        if v.device != x.device:
            raise ValueError(
                f"{name} is on {v.device} but x is on {x.device}; move one to the other"
            )
        if v.dtype != x.dtype and v.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} must be float32, float64 or of the type of x, {x.dtype}, got {v.dtype}; "
                "convert one, as by module.to(x.dtype)"
            )


def _check_residual(residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "broadcast it, as by residual.expand_as(x)"
        )
    if residual.device != x.device:
        raise ValueError(
            f"residual is on {residual.device} but x is on {x.device}; move one to the other"
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"residual must have the type of x, {x.dtype}, got {residual.dtype}; "
            "convert it, as by residual.to(x.dtype)"
        )


def _check_mask(mask: Tensor, x: Tensor) -> None:
    expected = (x.shape[0], *x.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"mask must have the shape of x without its channels, {tuple(expected)}, "
            f"got {tuple(mask.shape)}; broadcast it, as by mask.expand(...)"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}; compare it, as by mask > 0")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device} but x is on {x.device}; move one to the other")


def check_eps(eps: float) -> None:
    """Refuse what no variance can be made safe by."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}; the usual is 1e-5")


def _check_count(count: int, x: Tensor) -> None:
    if count > 1:
        return
    _check_not_empty(x)
    # The first words are torch's, which people search for.
    raise ValueError(
        f"Expected more than 1 value per channel when training, got input size {x.shape}: "
        "each value would be normalised to 0 by itself. Use a larger batch (DataLoader's "
        "drop_last=True leaves out a last batch of one), or call eval() to normalise by the "
        "running statistics"
    )


def _check_masked_count(count: Tensor) -> None:
    if torch._C._are_functorch_transforms_active():
        return  # the count is not a number there
    message = (
        "mask must leave more than 1 value per channel when training; "
        "leave batches that are all padding out of training"
    )
    if count.device.type == "cpu" and not torch.compiler.is_compiling():
        if count < 2:
            raise ValueError(message)
    else:
        torch._assert_async(count > 1, message)  # without waiting for the device


def activation_code(activation: str | None) -> int:
    """Return the code of an activation, or say which there are."""
    try:
        return _CODES[activation]
    except KeyError:
        raise ValueError(
            f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}; "
            "apply any other to the result"
        ) from None
