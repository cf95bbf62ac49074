"""Who is measured: each peer makes of a case one call that returns its results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import functional, ops
from batchnorm.ops import reference
from benchmarks.cases import Case, Inputs

Call = Callable[[], tuple[Tensor, ...]]
# y of x, weight, bias, residual, and for inference mean and var.
Normalise = Callable[..., Tensor]


def call(case: Case, inputs: Inputs, normalise: Normalise) -> Call:
    """A call that normalises the inputs, with its backward where the mode asks."""
    mean, var = inputs.mean, inputs.var
    if case.mode != "forward_backward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                given = (inputs.x, inputs.weight, inputs.bias, inputs.residual)
                return (normalise(*given, mean, var),)

        return forward

    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
    residual = None if inputs.residual is None else inputs.residual.detach().requires_grad_()
    wanted = leaves if residual is None else [*leaves, residual]

    def both() -> tuple[Tensor, ...]:
        y = normalise(*leaves, residual, mean, var)
        return (y.detach(), *torch.autograd.grad(y, wanted, inputs.dy))

    return both


def ours(case: Case) -> Normalise:
    activation = None if case.kind == "plain" else "relu"

    def infer(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        return functional.normalize(
            x, mean, var, weight, bias, residual=residual, activation=activation
        )

    def train(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        return functional.batch_norm(x, weight, bias, residual=residual, activation=activation).y

    return infer if case.mode == "inference" else train


def operations(case: Case, inputs: Inputs) -> Callable[[], object]:
    """A call of our ops alone, without autograd."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    code = functional.activation_code(None if case.kind == "plain" else "relu")
    affine = (weight, bias, inputs.residual, 1e-5, code)
    if case.mode == "inference":
        return lambda: ops.normalize(x, inputs.mean, inputs.var, *affine)

    def forward() -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = ops.training_forward(x, *affine)
        return results

    if case.mode == "forward":
        return forward
    _, mean, var, gate = forward()
    saved = (mean, var, weight, bias, None, gate if gate.numel() else None, 1e-5, code)
    return lambda: (forward(), ops.training_backward(inputs.dy, x, *saved))


def exact(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results in float64, by the reference."""
    x, dy, residual, weight, bias = (
        None if t is None else t.double()
        for t in (inputs.x, inputs.dy, inputs.residual, inputs.weight, inputs.bias)
    )
    code = functional.activation_code(None if case.kind == "plain" else "relu")
    if case.mode == "inference":
        given = (inputs.mean, inputs.var, weight, bias, residual)
        return (reference.normalize(x, *given, 1e-5, code),)
    y, mean, var, gate = reference.training_forward(x, weight, bias, residual, 1e-5, code)
    if case.mode == "forward":
        return (y,)
    saved = (None, gate) if gate.numel() else (None, None)
    dx, dz, dweight, dbias = reference.training_backward(
        dy, x, mean, var, weight, bias, *saved, 1e-5, code
    )
    return (y, dx, dweight, dbias, *([dz] if residual is not None else []))


def eager(case: Case) -> Normalise:
    """What one writes with torch: in place where autograd allows it."""
    training, activated = case.mode != "inference", case.kind != "plain"

    def normalise(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        statistics = (None, None) if training else (mean, var)
        y = F.batch_norm(x, *statistics, weight, bias, training)
        if residual is not None:
            y = y.add_(residual)
        return F.relu_(y) if activated else y

    return normalise


def compiled(case: Case) -> Normalise:
    torch.compiler.reset()  # each case compiles afresh; dynamo gives up after eight
    return torch.compile(eager(case), fullgraph=True)


def onednn(case: Case, inputs: Inputs) -> Call | None:
    """oneDNN through torch's mkldnn layout; the conversions are not counted."""
    if inputs.x.dim() != 4 or case.type != "float32" or case.mode == "forward_backward":
        return None
    x = inputs.x.to_mkldnn()
    residual = None if inputs.residual is None else inputs.residual.to_mkldnn()
    training = case.mode != "inference"

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            y = F.batch_norm(x, inputs.mean, inputs.var, inputs.weight, inputs.bias, training, 0.0)
            if residual is not None:
                y = y + residual
            return (y if case.kind == "plain" else F.relu(y),)

    return call


def jax(case: Case, inputs: Inputs) -> Call | None:
    if importlib.util.find_spec("jax") is None or case.layout != "contiguous":
        return None
    import jax
    import jax.numpy as jnp

    x, dy, residual, weight, bias, mean, var = (
        None
        if t is None
        else jnp.asarray(t.float().numpy()).astype(case.type if full else "float32")
        for t, full in (
            (inputs.x, True),
            (inputs.dy, True),
            (inputs.residual, True),
            (inputs.weight, False),
            (inputs.bias, False),
            (inputs.mean, False),
            (inputs.var, False),
        )
    )
    axes = tuple(a for a in range(x.ndim) if a != 1)
    wide = (1, -1) + (1,) * (x.ndim - 2)

    def normalise(x, weight, bias, residual):
        if case.mode == "inference":
            m, v = mean.reshape(wide), var.reshape(wide)
        else:
            m = jnp.mean(x, axes, dtype="float32", keepdims=True)
            v = jnp.var(x.astype("float32"), axes, keepdims=True)
        y = (x - m) * (weight.reshape(wide) * jax.lax.rsqrt(v + 1e-5)) + bias.reshape(wide)
        if residual is not None:
            y = y + residual
        return (y if case.kind == "plain" else jax.nn.relu(y)).astype(x.dtype)

    def both(x, weight, bias, residual):
        y, pull = jax.vjp(normalise, x, weight, bias, residual)
        return y, *(g for g in pull(dy) if g is not None)

    run = jax.jit(both if case.mode == "forward_backward" else normalise)

    def call() -> tuple[Tensor, ...]:
        results = jax.block_until_ready(run(x, weight, bias, residual))
        return results if isinstance(results, tuple) else (results,)

    return call


PEERS: dict[str, Callable[[Case, Inputs], Call | None]] = {
    "eager": lambda case, inputs: call(case, inputs, eager(case)),
    "compile": lambda case, inputs: call(case, inputs, compiled(case)),
    "oneDNN": onednn,
    "JAX": jax,
}
# These compile for each case or convert its layout: measured on a few shapes.
SLOW_TO_START = {"compile", "oneDNN", "JAX"}
