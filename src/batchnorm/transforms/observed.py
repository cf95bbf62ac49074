"""What a network computes in both modes, to compare it before and after a change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.transforms.calls import largest_difference, tolerance
from batchnorm.transforms.dataflow import preserved

__all__ = ["Observed", "compare", "observe"]

_OVER_A_KINK = 1e-2
"""How much gradients may change but in float64: rounding carries values over the kink of ReLU."""


@dataclass
class Observed:
    """What a network computed: its outputs, gradients and running statistics."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    statistics: list[Tensor]
    double: bool


def observe(
    model: nn.Module, example: tuple[Any, ...], named: dict[str, Any], double: bool | None = None
) -> Observed:
    """Run the network in evaluation and in training, leaving it as it was."""
    if double is None:
        try:
            return observe(model, example, named, True)
        except (RuntimeError, TypeError):  # a type is written into it, or the device has none
            return observe(model, example, named, False)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.random.fork_rng())
        if double:
            stack.enter_context(_in_double(model))
            example, named = tree_map_only(Tensor, _widened, (example, named))
        model.eval()
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = _tensors(model(*example, **named))
        model.train()
        torch.manual_seed(0)
        with torch.enable_grad():
            trained = _tensors(model(*example, **named))
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = _gradients(trained, parameters)
        statistics = [b.clone() if b.is_floating_point() else b.float() for b in model.buffers()]
        return Observed([*outputs, *(y.detach() for y in trained)], gradients, statistics, double)


def _gradients(outputs: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    loss = torch.zeros(())
    for y in outputs:
        if y.requires_grad:
            weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device)
            loss = loss.to(y) + (y * weights.sin().view(y.shape)).sum()
    if not loss.requires_grad or not parameters:
        return []
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [g for g in found if g is not None]


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]


def _widened(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


@contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    # The data of the parameters is exchanged, which remain the objects that optimisers hold.
    kept = [(p, p.data) for p in model.parameters()]
    try:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _widened(buffer)
        for parameter, data in kept:
            parameter.data = _widened(data)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def compare(before: Observed, after: Observed) -> float:
    """Return by how much, at most, something changed over its largest value.

    Raises:
        ValueError: it is more than rounding would.
    """
    worst = 0.0
    for what in ("outputs", "gradients", "statistics"):
        old, new = getattr(before, what), getattr(after, what)
        same = len(old) == len(new)
        largest, scale = largest_difference(old, new) if same else (float("inf"), 1.0)
        relative = largest / scale if scale else largest
        limit = max(map(tolerance, old), default=0.0)
        if what == "gradients" and not before.double:
            limit = max(limit, _OVER_A_KINK)
        if not relative <= limit:
            raise ValueError(
                f"the {what} of the fused network differ by {relative:.1g} of the largest value: "
                "it does more in its forward than compute, or is not the same from run to run. "
                "It is as it was"
            )
        worst = max(worst, relative)
    return worst
