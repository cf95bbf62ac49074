r"""Batch normalization as functions: everything is an argument, nothing is kept.

[P1] is Ioffe & Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift*, 2015, arXiv 1502.03167.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from batchnorm import ops
from batchnorm.ops import reference, variants
from batchnorm.validation import (
    ACTIVATIONS,
    activation_code,
    check_count,
    check_eps,
    check_input,
    check_mask,
    check_masked_count,
    check_not_empty,
    check_residual,
    check_total_count,
    check_vectors,
)

__all__ = [
    "ACTIVATIONS",
    "Moments",
    "TrainingResult",
    "batch_norm",
    "batch_renorm",
    "ghost_batch_norm",
    "lp_batch_norm",
    "moments",
    "normalize",
    "sync_batch_norm",
    "update_running",
]


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
    check_input(x)
    check_not_empty(x)
    if mask is not None:
        check_mask(mask, x)
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
    check_input(x)
    check_vectors(x, mean=mean, var=var, weight=weight, bias=bias)
    check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if x.numel() == 0:
        return reference.normalize(x, mean, var, weight, bias, residual, eps, code)
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
        x: Values of shape (N, C, \*), floating, two or more for each channel. With N = 0, y is
            as empty and n is 0.
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
    check_input(x)
    check_vectors(x, weight=weight, bias=bias)
    check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if x.shape[0] == 0:
        zeros = x.new_zeros(x.shape[1], dtype=reference.STATISTICS_DTYPE)
        y = reference.normalize(x, zeros, zeros, weight, bias, residual, eps, code)
        return TrainingResult(y, Moments(zeros, zeros, 0))
    if mask is not None:
        check_mask(mask, x)
        mean, var, counted = reference.masked_moments(x, mask)
        check_masked_count(counted)
        y = ops.normalize(x, mean, var, weight, bias, residual, eps, code)
        return TrainingResult(y, Moments(mean, var, counted))
    count = x.numel() // max(x.shape[1], 1)
    check_count(count, x)
    y, mean, var, _ = ops.training_forward(x, weight, bias, residual, eps, code)
    return TrainingResult(y, Moments(mean, var, count))


def ghost_batch_norm(
    x: Tensor,
    size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> TrainingResult:
    r"""Normalise each group of ``size`` consecutive samples by the moments of that group.

    .. math::

        y_i = \mathrm{act}\left(\gamma\,\frac{x_i - \mu_{g(i)}}{\sqrt{\sigma^2_{g(i)} + \epsilon}}
              + \beta + r_i\right), \qquad
        g(i) = \min(\lfloor i / \mathrm{size} \rfloor, \lfloor N / \mathrm{size} \rfloor - 1)

    A remainder joins the last group, so that no group is smaller than asked for.

    Args:
        x: Values of shape (N, C, \*), floating.
        size: Samples in a group, from 1 to N; a group needs two values for each channel.
        weight: γ of shape (C,). Default: 1.
        bias: β of shape (C,). Default: 0.
        eps: ε, finite and not negative.
        residual: r, of the shape and type of ``x``. Default: 0.
        activation: One of :data:`ACTIVATIONS`. Default: the identity.

    Returns:
        y, of the shape and type of ``x``, and the :class:`Moments` of the whole batch, merged
        from those of the groups: what plain batch normalization would track.

    Raises:
        ValueError: As :func:`batch_norm`, or ``size`` is not in 1 to N.
        TypeError: As :func:`batch_norm`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> ghost_batch_norm(x, 2, eps=0.0).y.flatten().tolist()
        [-1.0, 1.0, -1.0, 1.0]

    References:
        Hoffer, Hubara & Soudry 2017, *Train longer, generalize better*, arXiv 1705.08741,
        Algorithm 1, which however updates the running statistics once for each group.
    """
    check_input(x)
    check_vectors(x, weight=weight, bias=bias)
    check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if x.shape[0] == 0:
        return batch_norm(x, weight, bias, eps, residual=residual, activation=activation)
    if not 1 <= size <= x.shape[0]:
        raise ValueError(
            f"size must be from 1 to the {x.shape[0]} samples of the batch, got {size}; "
            "lower it, or leave out a short last batch (DataLoader's drop_last=True)"
        )
    n = x.numel() // max(x.shape[1], 1)
    check_count(n // x.shape[0] * size, x)
    y, mean, var = variants.ghost_forward(x, size, weight, bias, residual, eps, code)
    return TrainingResult(y, Moments(mean, var, n))


def batch_renorm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> TrainingResult:
    r"""Normalise by the moments of the batch, corrected towards the running statistics.

    .. math::

        y = \mathrm{act}\left(\gamma\left(\frac{x - \mu}{\sigma}\,r + d\right) + \beta
            + \mathrm{residual}\right), \quad
        r = \mathrm{clip}\left(\frac{\sigma}{\bar\sigma}, \frac1{r_\max}, r_\max\right), \quad
        d = \mathrm{clip}\left(\frac{\mu - \bar\mu}{\bar\sigma}, -d_\max, d_\max\right)

    with σ = √(σ²+ε) of the batch and :math:`\bar\sigma` likewise of the running statistics; r and
    d are constants for the gradient. Where neither is clipped, training computes what evaluation
    does. With r_max = 1 and d_max = 0 it is plain batch normalization.

    Args:
        x: Values of shape (N, C, \*), floating, two or more for each channel.
        running_mean: :math:`\bar\mu` of shape (C,).
        running_var: :math:`\bar\sigma^2` of shape (C,).
        weight: γ of shape (C,). Default: 1.
        bias: β of shape (C,). Default: 0.
        eps: ε, finite and not negative.
        r_max: 1 or more, a number or a tensor of one value.
        d_max: 0 or more, a number or a tensor of one value.
        residual: Added before the activation, of the shape and type of ``x``. Default: 0.
        activation: One of :data:`ACTIVATIONS`. Default: the identity.
        mask: As in :func:`batch_norm`.

    Returns:
        y, of the shape and type of ``x``, and the :class:`Moments` of the batch.

    Raises:
        ValueError: As :func:`batch_norm`.
        TypeError: As :func:`batch_norm`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_renorm(x, torch.tensor([0.0]), torch.tensor([4.0]), eps=0.0).y.flatten().tolist()
        [0.5, 1.5]

    References:
        Ioffe 2017, *Batch Renormalization*, arXiv 1702.03275, Algorithm 1.
    """
    check_vectors(x, running_mean=running_mean, running_var=running_var)
    # Detached, as r and d are constants in forward mode too. An empty batch has no moments, and
    # nothing to correct.
    mean, var = moments(x.detach(), mask=mask)[:2] if x.shape[0] else (running_mean, running_var)
    r, d = variants.renorm_correction(mean, var, running_mean, running_var, eps, r_max, d_max)
    scale = r if weight is None else weight * r
    shift = d if weight is None else weight * d
    if bias is not None:
        shift = shift + bias
    return batch_norm(x, scale, shift, eps, residual=residual, activation=activation, mask=mask)


def lp_batch_norm(
    x: Tensor,
    p: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    central: bool = False,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> TrainingResult:
    r"""Centre by the mean of the batch, and scale by a mean of p-th powers.

    .. math::

        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{s^2 + \epsilon}} + \beta + r\right),
        \qquad s = \left(\tfrac1n \sum |v|^p\right)^{1/p}, \quad s = \max |v|
        \text{ for } p = \infty

    with v = x, the *raw* moment, or v = x − μ, the *central* one. The central one with p = 2 is
    batch normalization; the raw one is not, as it feels the mean.

    Args:
        x: Values of shape (N, C, \*), floating, two or more for each channel.
        p: 1 or more, ``math.inf`` included.
        weight: γ of shape (C,). Default: 1.
        bias: β of shape (C,). Default: 0.
        eps: ε, finite and not negative.
        central: Whether v is x − μ. Default: x, as [P2] has it.
        residual: r, of the shape and type of ``x``. Default: 0.
        activation: One of :data:`ACTIVATIONS`. Default: the identity.
        mask: As in :func:`batch_norm`.

    Returns:
        y, of the shape and type of ``x``, and the :class:`Moments` with s² in place of the
        variance.

    Raises:
        ValueError: As :func:`batch_norm`, or ``p`` is less than 1.
        TypeError: As :func:`batch_norm`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> lp_batch_norm(x, 1, eps=0.0).y.flatten().tolist()
        [-0.5, 0.5]
        >>> lp_batch_norm(x, 1, eps=0.0, central=True).y.flatten().tolist()
        [-1.0, 1.0]

    References:
        Raw: [P2] Santurkar et al. 2018, arXiv 1805.11604, section 3.3 ("before shifting the
        mean"). Central: Hoffer et al. 2018, *Norm matters*, arXiv 1803.01814, section 4, there
        with a constant for each p that makes a Gaussian's scale its standard deviation and that
        γ takes up here.
    """
    check_input(x)
    check_vectors(x, weight=weight, bias=bias)
    check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if not p >= 1:
        raise ValueError(f"p must be 1 or more, got {p}; the usual are 1, 2 and math.inf")
    if x.shape[0] == 0:
        return batch_norm(x, weight, bias, eps, residual=residual, activation=activation)
    mean, _, n = moments(x, mask=mask)
    if isinstance(n, Tensor):
        check_masked_count(n)
    else:
        check_count(n, x)
    power = variants.lp_power(x, mean, p, central, mask, n)
    y = ops.normalize(x, mean, power, weight, bias, residual, eps, code)
    return TrainingResult(y, Moments(mean, power, n))


def sync_batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    process_group: dist.ProcessGroup | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> TrainingResult:
    r"""Normalise by the moments of the batches of all processes together.

    .. math::

        \mu = \frac1n \sum_k n_k\,\mu_k, \qquad
        \sigma^2 = \frac1n \sum_k n_k \left(\sigma_k^2 + (\mu_k - \mu)^2\right), \qquad
        n = \sum_k n_k

    from the number, mean and variance of the values of every process k, exchanged in float64.
    Every process gets the same bits, and computes y as :func:`batch_norm` would on the batches
    put together. The gradient of its x is that of the sum of all processes' losses,

    .. math::

        dx = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} \left(dz
            - \frac1n \sum_k \sum dz - \frac{\hat x}{n} \sum_k \sum dz\,\hat x\right)

    while those of γ and β are of its own values, like every other parameter's. Summed over the
    processes they are those of one process; :class:`DistributedDataParallel
    <torch.nn.parallel.DistributedDataParallel>` averages, which is right for losses that are means
    over batches of one size. Where sizes differ, sum the loss over the batch, multiply it by the
    number of processes, and divide it by the samples in all.

    Every process of the group must call it, as often and in the same order as the others, and so
    with its backward; one without data passes a batch of no samples. Outside of any process
    group, and in one of a single process, it is :func:`batch_norm`.

    Args:
        x: Values of shape (N, C, \*), floating, of this process; N may be 0. All together need
            two or more for each channel.
        weight: γ of shape (C,). Default: 1.
        bias: β of shape (C,). Default: 0.
        eps: ε, finite and not negative.
        process_group: The processes. Default: all, if :mod:`torch.distributed` is initialised.
        residual: r, of the shape and type of ``x``. Default: 0.
        activation: One of :data:`ACTIVATIONS`. Default: the identity.
        mask: As in :func:`batch_norm`; the masks of some processes may be empty.

    Returns:
        y, of the shape and type of ``x``, and the :class:`Moments` of all processes' values.

    Raises:
        ValueError: As :func:`batch_norm`, of the values of all processes.
        TypeError: As :func:`batch_norm`.
        RuntimeError: Another process ended, or did not call it within the time-out of the group.
            (NCCL ends the process instead, unless told otherwise.)
        NotImplementedError: Of several processes, under :func:`torch.vmap` or in forward mode.

    Example:
        >>> import torch
        >>> sync_batch_norm(torch.tensor([[1.0], [3.0]]), eps=0.0).y.flatten().tolist()
        [-1.0, 1.0]

    References:
        Peng et al. 2017, *MegDet*, arXiv 1711.07240, section 3.2 (*Cross-GPU Batch
        Normalization*), there with a second exchange for σ². Backward: [P1] section 3. The
        gradients of γ and β are those of :class:`torch.nn.SyncBatchNorm`.
    """
    group, ranks = processes(process_group)
    if ranks == 1:
        return batch_norm(
            *(x, weight, bias, eps), residual=residual, activation=activation, mask=mask
        )
    check_input(x)
    check_vectors(x, weight=weight, bias=bias)
    check_residual(residual, x)
    code = activation_code(activation)
    check_eps(eps)
    if mask is not None:
        check_mask(mask, x)
    y, mean, var, n = ops.synchronized_forward(
        *(x, weight, bias, residual, mask, eps, code, group, ranks)
    )
    visible = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    if mask is not None:
        check_masked_count(n)
    elif x.numel() < 2 * x.shape[1]:  # else it is not for this process to look
        if visible and n == 0:
            return TrainingResult(y, Moments(mean, var, 0))
        check_total_count(n, visible)
    known = visible and x.device.type == "cpu"  # elsewhere it would wait for the device
    return TrainingResult(y, Moments(mean, var, int(n) if known else n))


def processes(group: dist.ProcessGroup | None) -> tuple[str, int]:
    """Return the name of a process group and how many processes it has: 1 where there is none."""
    if not dist.is_available() or not dist.is_initialized():
        return "", 1
    if group is None:
        group = dist.group.WORLD
        assert group is not None
    return group.group_name, dist.get_world_size(group)


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
    if isinstance(batch.n, int) and batch.n == 0:
        return
    ops.update_running(running_mean, running_var, num_batches, *batch, momentum)
