"""The layers of a network as probes see them: a linear operation and what normalises it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from batchnorm.transforms.dataflow import trace

__all__ = ["Layer", "find_layers"]


@dataclass(frozen=True)
class Layer:
    """One linear operation (W, b) with the normalisation behind it, if any."""

    name: str
    site: nn.Module
    """The module whose output is the input of the nonlinearity."""
    parameters: frozenset[str]
    """Names of the parameters of this layer and of whatever follows before the next one."""

    @property
    def weight(self) -> str:
        """Name of the parameter W."""
        return f"{self.name}.weight"


def find_layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """The convolutions and fully connected layers of ``model``, in the order they run.

    Found by running the network once on ``example``, so that the arm without normalisation has
    the same layers by the same names.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    # A frozen weight, or one tied to an earlier layer's, has no gradient of its own.
    flows = [flow for flow in trace(model, example) if f"{flow.name}.weight" in trained]
    modules = dict(model.named_modules())
    owned: dict[str, set[str]] = {flow.name: set() for flow in flows}
    prefixes = {
        prefix: flow.name
        for flow in flows
        for prefix in (flow.name, flow.norm)
        if prefix is not None
    }
    current = flows[0].name if flows else ""
    for name, _ in model.named_parameters():
        holder = name.rpartition(".")[0]
        current = prefixes.get(holder, current)
        if current:
            owned[current].add(name)
    return [
        Layer(
            flow.name,
            modules[flow.norm] if flow.norm is not None else flow.module,
            frozenset(owned[flow.name]),
        )
        for flow in flows
    ]
