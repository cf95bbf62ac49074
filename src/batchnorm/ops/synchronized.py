"""Batch normalization over several processes: one exchange forward, one backward.

Forward gathers the number, mean and variance of each process's values, backward adds up the two
sums of [P1] section 3. The collectives are torch's functional ones, which a compiler sees in its
graph; their derivatives are written here, so that they can be taken any number of times.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.ops import reference
from batchnorm.ops.autograd import (
    _apply_here,
    _below_autograd,
    _Function,
    _ops,
    _requires_grad,
    backward_apply,
    backward_sums,
    moments,
    normalize,
)
from batchnorm.ops.reference import NONE, STATISTICS_DTYPE
from batchnorm.ops.schemas import library

_collectives = torch.ops._c10d_functional


def _exchange(collective: Any, *args: Any) -> Tensor:
    """Take part in a collective operation and wait for its result."""
    try:
        result: Tensor = _collectives.wait_tensor.default(collective.default(*args))
    except RuntimeError as error:
        error.add_note(
            "The processes could not exchange the statistics of a batch. One of them ended (its "
            "own error comes first), or did not call the layer as often as the others: a branch "
            "or a loop that depends on its data, or training mode where the others evaluate. "
            "A process without data passes a batch of no samples."
        )
        raise
    return result


def _of_share(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return number, mean and variance of this process's values, in one row."""
    if not x.numel():
        return x.new_zeros(1 + 2 * x.shape[1], dtype=STATISTICS_DTYPE)
    if mask is None:
        mean, var = moments(x)
        n = mean.new_full((1,), x.numel() // x.shape[1])
    else:
        mean, var, count = reference.masked_moments(x, mask)
        n = count.view(1)
    return torch.cat([n, mean, var])


class _Total(_Function):
    """The sum over all processes, of which each gets the sum of the gradients of all."""

    generate_vmap_rule = False  # torch waits for one slice of a batch and not for the others

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], share: Tensor, group: str) -> tuple[Tensor, int]:
        return _Total.apply(share.movedim(in_dims[0], 0), group), 0

    @staticmethod
    def forward(share: Tensor, group: str) -> Tensor:
        with _below_autograd():
            return _exchange(_collectives.all_reduce, share.contiguous(), "sum", group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.group), None


class _Synchronized(_Function):
    generate_vmap_rule = False

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise NotImplementedError(
            "Sync statistics cannot be mapped by vmap, as processes exchange one batch at a time; "
            "call the layer in a loop"
        )

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise NotImplementedError(
            "Sync statistics have no forward mode; differentiate in reverse mode"
        )

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        activation: int,
        group: str,
        ranks: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row = _of_share(x, mask)
        # One row each, the same bits everywhere.
        gathered = _exchange(_collectives.all_gather_into_tensor, row, ranks, group).view(ranks, -1)
        n = gathered[:, :1]
        # Of no values the moments are not numbers.
        mean, var = torch.where(n > 0, gathered[:, 1:], 0.0).chunk(2, 1)
        total = n.sum()
        mean, var = reference.merge(mean, var, n / total)
        # The ops want values.
        apply = normalize if x.numel() else reference.normalize
        return apply(x, mean, var, weight, bias, residual, eps, activation), mean, var, total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, residual, mask, ctx.eps, ctx.activation, ctx.group, _ = inputs
        _, mean, var, n = output
        ctx.mark_non_differentiable(n)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        if ctx.activation == NONE:
            residual = None
        ctx.save_for_backward(x, mean, var, weight, bias, residual, mask, n)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        x, mean, var, weight, bias, residual, mask, n = ctx.saved_tensors
        eps, activation = ctx.eps, ctx.activation
        sums: Any = backward_sums if x.numel() else reference.backward_sums
        apply: Any = backward_apply if x.numel() else reference.backward_apply
        dx = dweight = dbias = dresidual = None
        shares = []
        if dy is not None:
            dbias, dweight, dz = sums(
                dy, x, mean, var, weight, bias, residual, None, eps, activation
            )
            shares += [dbias, dweight]
            if activation != NONE and residual is not None:
                dy, activation = dz, NONE
            dresidual = dy
        if dmean is not None or dvar is not None:
            shares += [torch.zeros_like(mean) if d is None else d for d in (dmean, dvar)]
        if ctx.needs_input_grad[0]:
            means = list((_Total.apply(torch.stack(shares), ctx.group) / n).unbind())
            if dmean is not None or dvar is not None:
                dvar, dmean = means.pop(), means.pop()
                dx = _affine(x, mask, mean, torch.ones_like(mean), 2 * dvar, dmean, 0.0)
            if dy is not None:
                of_z = (None, None) if mask is not None else means
                direct = apply(dy, x, mean, var, weight, bias, *of_z, eps, activation)
                dx = direct if dx is None else dx + direct
                if mask is not None:  # what was not counted did not move the moments
                    scale = -torch.rsqrt(var + eps) * (1 if weight is None else weight)
                    dx = dx + _affine(x, mask, mean, var, scale * means[1], scale * means[0], eps)
        return (
            dx,
            None if weight is None else dweight,
            None if bias is None else dbias,
            dresidual if ctx.has_residual else None,
            *(None,) * 5,
        )


def _affine(
    x: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    slope: Tensor,
    offset: Tensor,
    eps: float,
) -> Tensor:
    """Return slope·x̂ + offset where a value was counted: a gradient through the moments."""
    apply = normalize if x.numel() else reference.normalize
    values: Tensor = apply(x, mean, var, slope, offset, None, eps, NONE)
    return values if mask is None else torch.where(mask.unsqueeze(1), values, 0.0)


def _synchronized(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Forward mode too goes to autograd, which says that there is none.
    watched = _requires_grad(args) or forward_ad._current_level >= 0
    apply: Any = _apply_here(_Synchronized) if watched else _Synchronized.forward
    result: tuple[Tensor, Tensor, Tensor, Tensor] = apply(*args)
    return result


# An op, so that a compiler's front end need not read this file; its tracer sees what is inside.
library.define(
    "synchronized_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "float eps, int activation, str group, SymInt ranks) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor n)"
)
library.impl("synchronized_forward", _synchronized, "CompositeImplicitAutograd")


def synchronized_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise by the moments of all processes' values: y, mean, var and their number."""
    if torch.compiler.is_compiling():
        return _ops.synchronized_forward.default(*args)  # type: ignore[no-any-return]
    if torch._C._are_functorch_transforms_active():
        return _Synchronized.apply(*args)  # type: ignore[no-any-return]
    return _synchronized(*args)
