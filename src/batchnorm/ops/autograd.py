"""The derivatives of the ops, forward and reverse, of any order.

A first backward is one op over what forward saved. Where somebody will differentiate it in
turn (``create_graph=True``, ``torch.func``) it is the reference instead, whose differentiable
operations are over the same saved inputs and outputs; the ops of the backward do the same when
they are differentiated on their own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.ops import reference
from batchnorm.ops.reference import (
    NONE,
    compute_dtype,
    moments_backward,
    per_channel,
    preactivation,
    reduction_axes,
    slope,
    uses_gate,
)
from batchnorm.ops.schemas import NAMESPACE, library

_ops = getattr(torch.ops, NAMESPACE)
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return (
        (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class _Function(torch.autograd.Function):
    # vmap runs forward, backward and jvp on batched tensors, which the ops and torch handle.
    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return cls.apply_here(*args)

    @classmethod
    def apply_here(cls, *args: Any) -> Any:
        """Apply at the level of torch.func that the dispatcher is at.

        ``Function.apply`` would start from the top again, and outside torch.func it binds the
        signature anew at every call, which on small inputs costs more than normalising.
        """
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


@contextmanager
def _differentiable_jvp(ctx: Any) -> Iterator[list[Any]]:
    """Yield what was saved, and let jvp be differentiated forward.

    Autograd runs jvp with forward mode off, and a jvp of a jvp would lose its outer tangent.
    """
    primals = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
    with forward_ad._set_fwd_grad_enabled(True):
        yield primals


def _tangent(
    primals: Sequence[Any], tangents: Sequence[Tensor | None], eps: float, activation: int
) -> Tensor:
    """Return the tangent of y = normalize(*primals, eps, activation)."""
    x, mean, var, weight, bias, residual = primals
    x_t, mean_t, var_t, weight_t, bias_t, residual_t = tangents
    dtype = compute_dtype(x)

    def vector(v: Tensor) -> Tensor:
        return per_channel(v.to(dtype), x)

    xhat = preactivation(x, mean, var, None, None, None, eps)
    z_t = torch.zeros_like(xhat) if x_t is None else x_t.to(dtype)
    if mean_t is not None:
        z_t = z_t - vector(mean_t)
    z_t = z_t * vector(torch.rsqrt(var + eps))
    if var_t is not None:
        z_t = z_t - xhat * vector(0.5 * var_t / (var + eps))
    if weight is not None:
        z_t = z_t * vector(weight)
    if weight_t is not None:
        z_t = z_t + xhat * vector(weight_t)
    if bias_t is not None:
        z_t = z_t + vector(bias_t)
    if residual_t is not None:
        z_t = z_t + residual_t
    z = preactivation(x, mean, var, weight, bias, residual, eps)
    return (z_t * slope(z, activation)).to(x.dtype)


class _TrainingForward(_Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        activation: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with _below_autograd():
            return _ops.training_forward.default(x, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, bias, residual, ctx.eps, ctx.activation = inputs
        _, mean, var, gate = output
        ctx.mark_non_differentiable(gate)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        ctx.save_for_forward(x, weight, bias, residual, mean, var)
        if uses_gate(residual, ctx.activation):
            residual = None
        else:
            gate = None
            if ctx.activation == NONE:
                residual = None
        ctx.save_for_backward(x, mean, var, weight, bias, residual, gate)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dmean: Tensor | None, dvar: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, mean, _, weight, bias = saved[:5]
        dx = dweight = dbias = dresidual = None
        if dy is not None:
            arguments = (dy, *saved, ctx.eps, ctx.activation)
            if torch.is_grad_enabled() or forward_ad._current_level >= 0:
                dx, dresidual, dweight, dbias = reference.training_backward(*arguments)
            else:
                with _below_autograd():
                    gradients = _ops.training_backward.default(*arguments)
                dx, dresidual, dweight, dbias = gradients
            if ctx.activation == NONE:
                dresidual = dy
        if dmean is not None or dvar is not None:
            through_moments = moments_backward(x, mean, dmean, dvar)
            dx = through_moments if dx is None else dx + through_moments
        return (
            dx,
            None if weight is None else dweight,
            None if bias is None else dbias,
            dresidual if ctx.has_residual else None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        x_t: Tensor | None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
        residual_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        with _differentiable_jvp(ctx) as (x, weight, bias, residual, mean, var):
            mean_t, var_t = torch.zeros_like(mean), torch.zeros_like(var)
            if x_t is not None:
                axes = reduction_axes(x)
                mean_t = x_t.mean(axes, dtype=mean.dtype)
                centred = preactivation(x, mean, torch.ones_like(var), None, None, None, 0.0)
                var_t = 2 * (centred * x_t).mean(axes, dtype=var.dtype)
            primals = (x, mean, var, weight, bias, residual)
            tangents = (x_t, mean_t, var_t, weight_t, bias_t, residual_t)
            y_t = _tangent(primals, tangents, ctx.eps, ctx.activation)
        return y_t, mean_t, var_t, None


class _Normalize(_Function):
    @staticmethod
    def forward(
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        activation: int,
    ) -> Tensor:
        with _below_autograd():
            return _ops.normalize.default(x, mean, var, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.eps, ctx.activation = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight, bias, residual = ctx.saved_tensors
        eps, activation = ctx.eps, ctx.activation
        dx = dmean = dvar = dweight = dbias = dresidual = None
        sum_dz, sum_dz_xhat, dz = backward_sums(
            dy, x, mean, var, weight, bias, residual, None, eps, activation
        )
        if activation != NONE and residual is not None:
            dy, activation = dz, NONE
        if ctx.needs_input_grad[0]:
            dx = backward_apply(dy, x, mean, var, weight, bias, None, None, eps, activation)
        scale = 1 if weight is None else weight
        if ctx.needs_input_grad[1]:
            dmean = -sum_dz * scale * torch.rsqrt(var + eps)
        if ctx.needs_input_grad[2]:
            dvar = -0.5 * sum_dz_xhat * scale / (var + eps)
        if ctx.needs_input_grad[3]:
            dweight = sum_dz_xhat
        if ctx.needs_input_grad[4]:
            dbias = sum_dz
        if ctx.needs_input_grad[5]:
            dresidual = dy
        return dx, dmean, dvar, dweight, dbias, dresidual, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        with _differentiable_jvp(ctx) as primals:
            return _tangent(primals, tangents[:6], ctx.eps, ctx.activation)


def training_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise by the moments of the batch: y, mean, var and the gate."""
    if torch.compiler.is_compiling():
        return _ops.training_forward.default(x, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]
    return _TrainingForward.apply(x, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """Normalise by given statistics."""
    if torch.compiler.is_compiling():
        return _ops.normalize.default(x, mean, var, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]
    if _is_differentiated(x, mean, var, weight, bias, residual):
        return _Normalize.apply(x, mean, var, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]
    with _below_autograd():
        return _ops.normalize.default(x, mean, var, weight, bias, residual, eps, activation)  # type: ignore[no-any-return]


def _piece(name: str, composite: Callable[..., Any]) -> Callable[..., Any]:
    """Return the op, or where it is differentiated its composite."""
    op = getattr(_ops, name).default

    def call(*args: Any) -> Any:
        if _is_differentiated(*(a for a in args if isinstance(a, Tensor))):
            return composite(*args)
        with _below_autograd():
            return op(*args)

    library.impl(name, call, "Autograd")
    return lambda *args: op(*args) if torch.compiler.is_compiling() else call(*args)


moments = _piece("moments", reference.moments)
backward_sums = _piece("backward_sums", reference.backward_sums)
backward_apply = _piece("backward_apply", reference.backward_apply)
training_backward = _piece("training_backward", reference.training_backward)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    n: int | Tensor,
    momentum: float | None,
) -> None:
    """Move running statistics towards those of a batch, in place."""
    arguments = (running_mean, running_var, num_batches, mean, var, n, momentum)
    # A compiler fuses plain operations; and no op takes a number of values that is a tensor.
    if torch.compiler.is_compiling() or isinstance(n, Tensor):
        reference.update_running(*arguments)
    else:
        _ops.update_running.default(*arguments)


library.impl("training_forward", _TrainingForward.apply_here, "Autograd")
library.impl("normalize", _Normalize.apply_here, "Autograd")
