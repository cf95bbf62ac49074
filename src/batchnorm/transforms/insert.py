"""Put a normalisation where [P1] puts it: between a linear operation and its nonlinearity."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from batchnorm.nn.norms import make_norm, makes_bias_redundant
from batchnorm.transforms.dataflow import INSERTED, trace
from batchnorm.transforms.replace import channels_and_rank

__all__ = ["insert"]


def _normalize_output(module: nn.Module, inputs: Any, output: Tensor) -> Any:
    return module.get_submodule(INSERTED)(output)


def insert(model: nn.Module, norm: str, example: Tensor) -> list[str]:
    """Add the normalisation ``norm`` to a network that has none, in place.

    A convolution or fully connected layer whose output reaches a nonlinearity, found by running
    the network on ``example``, becomes z = g(BN(Wu)): its output goes through a new normalisation,
    kept as a child of the layer so that the names of all other parameters stay. The bias is
    dropped where a batch norm's β takes its place.

    Args:
        model: the network.
        norm: ``batch``, ``layer``, ``group`` or another registered name.
        example: a batch that the network accepts.

    Returns:
        One sentence for each change.

    Raises:
        ValueError: no place was found, or a layer is used more than once in one forward pass,
            so that one set of statistics cannot serve all its uses.

    References:
        [P1] arXiv 1502.03167, Section 3.2.
    """
    flows = [flow for flow in trace(model, example) if flow.nonlinear and flow.norm is None]
    shared = [flow.name for flow in flows if flow.calls > 1]
    if shared:
        raise ValueError(
            f"{', '.join(shared)}: used more than once in a forward pass, so one normalisation "
            "cannot serve. Write the network with its normalisation and pass that."
        )
    if not flows:
        raise ValueError(
            "no convolution or fully connected module leads to a nonlinearity (only torch.nn "
            "modules are seen, not functional calls). Write the network with its normalisation "
            "and pass that."
        )
    changes = []
    for flow in flows:
        channels, rank = channels_and_rank(flow.module)
        flow.module.add_module(INSERTED, make_norm(norm, channels, rank))
        flow.module.register_forward_hook(_normalize_output)
        change = f"{flow.name}: {norm} norm inserted behind it"
        if makes_bias_redundant(norm) and flow.module.bias is not None:
            flow.module.register_parameter("bias", None)
            change += ", its redundant bias dropped"
        changes.append(change)
    return changes
