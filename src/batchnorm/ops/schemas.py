"""The schemas, each with its reference, its fake and its batching rule.

``batchnorm.ops`` says what every argument and result means.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import reference
from batchnorm.ops.reference import (
    NONE,
    STATISTICS_DTYPE,
    compute_dtype,
    dense,
    gate_rows,
    pack_gate,
    unpack_gate,
    uses_gate,
)

NAMESPACE = "batchnorm"

# Everything registered here lives as long as this object.
library = torch.library.Library(NAMESPACE, "DEF")


def _channel_vector(x: Tensor, dtype: torch.dtype = STATISTICS_DTYPE) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(dense(x))


def _fake_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return _channel_vector(x), _channel_vector(x)


def _fake_normalize(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _fake_training_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = _like(x)
    if uses_gate(residual, activation):
        rows, length = gate_rows(y)
        gate = x.new_empty((rows, (length + 7) // 8), dtype=torch.uint8)
    else:
        gate = x.new_empty(0, dtype=torch.uint8)
    return y, _channel_vector(x), _channel_vector(x), gate


def _fake_dz(x: Tensor, residual: Tensor | None, gate: Tensor | None, activation: int) -> Tensor:
    if activation == NONE or (residual is None and gate is None):
        return x.new_empty(0)
    return _like(x)


def _fake_backward_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _channel_vector(x), _channel_vector(x), _fake_dz(x, residual, gate, activation)


def _fake_backward_apply(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _fake_training_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    return (
        _like(x),
        _fake_dz(x, residual, gate, activation),
        _channel_vector(x, dtype),
        _channel_vector(x, dtype),
    )


# What a batching rule needs to know of each argument and result, in the order of the schema:
# f(ull, of x's shape), c(hannel vector), g(ate), - (not a tensor).
_OPS: tuple[tuple[str, str, str, Callable[..., Any], Callable[..., Any]], ...] = (
    (
        "training_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
        "float eps, int activation) -> (Tensor y, Tensor mean, Tensor var, Tensor gate)",
        "fccf--",
        "fccg",
        reference.training_forward,
        _fake_training_forward,
    ),
    (
        "training_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, "
        "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate, "
        "float eps, int activation) "
        "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
        "ffccccfg--",
        "ffcc",
        reference.training_backward,
        _fake_training_backward,
    ),
    (
        "moments(Tensor x) -> (Tensor mean, Tensor var)",
        "f",
        "cc",
        reference.moments,
        _fake_moments,
    ),
    (
        "normalize(Tensor x, Tensor mean, Tensor var, "
        "Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation) -> Tensor y",
        "fccccf--",
        "f",
        reference.normalize,
        _fake_normalize,
    ),
    (
        "backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, "
        "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate, "
        "float eps, int activation) -> (Tensor sum_dz, Tensor sum_dz_xhat, Tensor dz)",
        "ffccccfg--",
        "ccf",
        reference.backward_sums,
        _fake_backward_sums,
    ),
    (
        "backward_apply(Tensor dy, Tensor x, Tensor mean, Tensor var, "
        "Tensor? weight, Tensor? bias, Tensor? mean_dz, Tensor? mean_dz_xhat, "
        "float eps, int activation) -> Tensor dx",
        "ffcccccc--",
        "f",
        reference.backward_apply,
        _fake_backward_apply,
    ),
)


def _batched(op: Any, argument_kinds: str, result_kinds: str) -> Callable[..., Any]:
    """Return the batching rule: B batches of C channels are one batch of B·C channels."""
    x_place = 1 if argument_kinds.startswith("ff") else 0

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(value: Any, dim: int | None, kind: str) -> Any:
            if kind == "-" or value is None:
                return value
            value = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
            value = value.expand(size, *value.shape[1:])
            return value.transpose(0, 1).flatten(1, 2) if kind == "f" else value.flatten()

        def unfold(value: Tensor, kind: str) -> Tensor:
            if kind == "c":
                return torch.unflatten(value, 0, (size, -1))
            return torch.unflatten(value, 1, (size, -1)).transpose(0, 1)

        # One sample of the batch shows the layout that a gate packs.
        x, x_dim = args[x_place], in_dims[x_place]
        sample = dense(x if x_dim is None else x.select(x_dim, 0))
        folded: list[Any] = []
        for value, dim, kind in zip(args, in_dims, argument_kinds, strict=True):
            if kind == "g" and value is not None:
                packed = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
                opened = torch.stack([unpack_gate(one, sample) for one in packed.unbind(0)])
                folded.append(pack_gate(fold(opened, 0, "f"), dense(folded[x_place])))
            else:
                folded.append(fold(value, dim, kind))
        # x decides the layout of a gate, so it must be what the op will see.
        folded[x_place] = dense(folded[x_place])
        results = op(*folded)
        single = isinstance(results, Tensor)
        out = []
        for value, kind in zip((results,) if single else results, result_kinds, strict=True):
            if not value.numel():
                out.append(value.expand(size, *value.shape))
            elif kind == "g":
                opened = unfold(unpack_gate(value, folded[x_place]), "f")
                out.append(torch.stack([pack_gate(one, sample) for one in opened.unbind(0)]))
            else:
                out.append(unfold(value, kind))
        return (out[0], 0) if single else (tuple(out), (0,) * len(out))

    return rule


def _batched_update(
    info: Any,
    in_dims: tuple[int | None, ...],
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    n: float,
    momentum: float | None,
) -> tuple[None, None]:
    """Update each of many running statistics by its batch, or the only one by all batches."""

    def batch_first(value: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return value.expand(info.batch_size, *value.shape)
        return value.movedim(dim, 0)

    mean, var = batch_first(mean, in_dims[3]), batch_first(var, in_dims[4])
    if in_dims[0] is None:
        n, pooled = n * info.batch_size, mean.mean(0)
        mean, var = pooled, (var + (mean - pooled).square()).mean(0)
    else:
        running_mean = batch_first(running_mean, in_dims[0])
        running_var = batch_first(running_var, in_dims[1])
        if num_batches is not None:
            num_batches = batch_first(num_batches, in_dims[2]).unsqueeze(-1)
    reference.update_running(running_mean, running_var, num_batches, mean, var, n, momentum)
    return None, None


library.define(
    "update_running(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches, "
    "Tensor mean, Tensor var, float n, float? momentum) -> ()"
)
library.impl("update_running", reference.update_running, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::update_running", lambda *_: None, lib=library)
torch.library.register_vmap(f"{NAMESPACE}::update_running", _batched_update, lib=library)

NAMES = ["update_running"]
"""Of the ops that a device may serve by kernels of its own."""

for _schema, _arguments, _results, _reference, _fake in _OPS:
    library.define(_schema)
    _name = _schema[: _schema.index("(")]
    NAMES.append(_name)
    library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
    _op = getattr(getattr(torch.ops, NAMESPACE), _name).default
    torch.library.register_vmap(
        f"{NAMESPACE}::{_name}", _batched(_op, _arguments, _results), lib=library
    )
