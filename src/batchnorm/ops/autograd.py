"""The derivatives of the ops, forward and reverse, of any order.

A first backward is one op over what forward saved. Where somebody will differentiate it in
turn (``create_graph=True``, ``torch.func``) it is the reference instead, whose differentiable
operations are over the same saved inputs and outputs. Forward mode takes the reference from the
start: autograd runs a custom jvp with forward mode off, so that a jvp of a jvp would silently
lose its outer tangent.

Plain calls are compiled where the build could (kernels/autograd); it says the same in C++.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad

from batchnorm.ops import reference
from batchnorm.ops.active import compiled_calls
from batchnorm.ops.reference import NONE, uses_gate
from batchnorm.ops.schemas import NAMESPACE, library

_ops = getattr(torch.ops, NAMESPACE)
_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_torch_func = torch._C._are_functorch_transforms_active


def _is_differentiated_again() -> bool:
    """Tell, in a backward, whether what it computes is differentiated in turn."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


class _Function(torch.autograd.Function):
    # vmap runs forward and backward on batched tensors, which the ops and torch handle.
    generate_vmap_rule = True
    apply: ClassVar[Callable[..., Any]]  # torch's, which has no types


def _apply_here(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return what applies a function at the level of torch.func that the dispatcher is at.

    ``Function.apply`` would start from the top again, and outside torch.func it binds the
    signature anew at every call, which on small inputs costs more than normalising.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def _decline(*_: Any) -> Any:
    """Stand for a call that is not compiled."""
    return NotImplemented


class _Op:
    """One op, and which of its forms a call takes."""

    def __init__(
        self, name: str, composite: Callable[..., Any], function: type[_Function] | None = None
    ) -> None:
        self._op = getattr(_ops, name).default
        self._compiled = getattr(compiled_calls, name, _decline)
        self._composite = composite
        self._apply = composite if function is None else function.apply
        self._apply_here = composite if function is None else _apply_here(function)
        library.impl(name, self._at_autograd, "Autograd")

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._op(*args)
        if forward_ad._current_level >= 0:
            return self._composite(*args)
        if _in_torch_func():
            return self._apply(*args)
        result = self._compiled(*args)
        if result is not NotImplemented:
            return result
        if _requires_grad(args):
            return self._apply_here(*args)
        with _below_autograd():
            return self._op(*args)

    def _at_autograd(self, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            return self._composite(*args)
        if not _requires_grad(args):
            with _below_autograd():
                return self._op(*args)
        if not _in_torch_func():
            return self._apply_here(*args)
        with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            return self._apply_here(*args)


def _requires_grad(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def _moments_backward(x: Tensor, mean: Tensor, dmean: Tensor | None, dvar: Tensor | None) -> Tensor:
    """Return (dmean + 2·dvar·(x − mean))/n, which is a normalisation of x."""
    n = x.numel() // x.shape[1]
    weight = torch.zeros_like(mean) if dvar is None else 2 * dvar / n
    bias = None if dmean is None else dmean / n
    dx: Tensor = normalize(x, mean, torch.ones_like(mean), weight, bias, None, 0.0, NONE)
    return dx


class _Moments(_Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            return _ops.moments.default(x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None, dvar: Tensor | None) -> Tensor:
        x, mean = ctx.saved_tensors
        return _moments_backward(x, mean, dmean, dvar)


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
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
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
            if _is_differentiated_again():
                dx, dresidual, dweight, dbias = reference.training_backward(*arguments)
            else:
                with _below_autograd():
                    gradients = _ops.training_backward.default(*arguments)
                dx, dresidual, dweight, dbias = gradients
            if ctx.activation == NONE:
                dresidual = dy
        if dmean is not None or dvar is not None:
            through_moments = _moments_backward(x, mean, dmean, dvar)
            dx = through_moments if dx is None else dx + through_moments
        return (
            dx,
            None if weight is None else dweight,
            None if bias is None else dbias,
            dresidual if ctx.has_residual else None,
            None,
            None,
        )


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


moments = _Op("moments", reference.moments, _Moments)
normalize = _Op("normalize", reference.normalize, _Normalize)
training_forward = _Op("training_forward", reference.training_forward, _TrainingForward)
training_backward = _Op("training_backward", reference.training_backward)
backward_sums = _Op("backward_sums", reference.backward_sums)
backward_apply = _Op("backward_apply", reference.backward_apply)

_update_running = getattr(compiled_calls, "update_running", _decline)


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
    elif _update_running(*arguments) is NotImplemented:
        with _below_autograd():
            _ops.update_running.default(*arguments)
        # A kernel writes past autograd, which is to notice where it saved the statistics.
        torch.autograd.graph.increment_version((running_mean, running_var))
