"""One step of training as probes see it: nothing they do here reaches the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from batchnorm.probes.layers import Layer

__all__ = ["Observation", "Step", "observe"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Observation:
    """What went through one module in the forward pass of the training step."""

    input: Tensor
    output: Tensor


@contextmanager
def observe(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Observation]]:
    """Keep a copy of what goes in and out of ``modules`` while the context is open.

    A copy, since an in-place activation would overwrite the original.
    """
    seen: dict[nn.Module, Observation] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = Observation(inputs[0].detach().clone(), output.detach().clone())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Step:
    """The step from θ_t to θ_{t+1} on one batch.

    Before the update, ``parameters`` are θ_t and ``gradients`` is ∇L(θ_t); ``updated`` is θ_{t+1}
    once the optimizer has run.
    """

    number: int
    model: nn.Module
    layers: list[Layer]
    x: Tensor
    y: Tensor
    loss_function: Loss
    lr: float
    random_state: Tensor
    """State of torch's generator before the forward pass, so that dropout can be repeated."""
    loss: float = float("nan")
    seen: Mapping[nn.Module, Observation] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Buffers before the forward pass."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    updated: dict[str, Tensor] = field(default_factory=dict)

    def loss_and_gradients(
        self, parameters: Mapping[str, Tensor], wanted: Iterable[str] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """L and ∇L at other parameters, on this step's batch, in training mode.

        The forward pass is this step's own in everything else: same mode, same buffers before it,
        same random numbers. Costs one forward and one backward pass.

        Args:
            parameters: all parameters by name.
            wanted: names of those to differentiate by; all by default.
        """
        names = list(parameters if wanted is None else wanted)
        leaves = {name: value.detach() for name, value in parameters.items()}
        leaves |= {name: leaves[name].requires_grad_() for name in names}
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            with torch.enable_grad():
                output = functional_call(self.model, (leaves, buffers), (self.x,))
                loss = self.loss_function(output, self.y)
                found = torch.autograd.grad(loss, [leaves[name] for name in names])
        finally:
            torch.set_rng_state(outside)
        return float(loss.detach()), dict(zip(names, found, strict=True))
