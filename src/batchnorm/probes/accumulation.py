"""Gradients accumulated over parts of a batch, against those of the whole."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from batchnorm.nn import batchnorm as ours
from batchnorm.nn.statistics import Ghost
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record
from batchnorm.transforms.convert import convert
from batchnorm.transforms.layers import batch_norms

__all__ = ["Accumulation"]


class Accumulation(Probe):
    """How far a gradient accumulated over parts of the batch is from gradients of the whole.

    ‖g − g_acc‖/‖g_acc‖ over all parameters, in float64, where g_acc adds up the gradients of the
    parts, each normalised by itself, and g is that of the whole batch normalised in such parts
    (``ghost``) or as one (``whole``). ``still``: both g and g_acc with the running statistics. All
    else is in evaluation, as dropout would draw other numbers for parts.
    """

    name = "accumulation"

    def __init__(self, parts: int, at: Collection[int]) -> None:
        """Parts of ``parts`` examples; the batch is a multiple of it. Measure at the steps ``at``.

        The network's batch norms are ours or exactly torch's.
        """
        self.parts, self.at = parts, at

    def before_update(self, step: Step) -> Iterator[Record]:
        """Three numbers."""
        if step.number not in self.at:
            return
        network = convert(copy.deepcopy(step.model)).double().eval()
        layers = list(batch_norms(network).values())
        x, y = step.x.double(), step.y.double() if step.y.is_floating_point() else step.y

        def gradient(size: int) -> Tensor:
            """Of the loss of the batch, computed in parts of ``size`` one after the other."""
            network.zero_grad()
            for part, target in zip(x.split(size), y.split(size), strict=True):
                loss = step.loss_function(network(part), target)
                # Of classes the loss is a mean, of numbers a sum.
                share = 1.0 if y.is_floating_point() else len(part) / len(x)
                (share * loss).backward()
            return torch.cat(
                [p.grad.flatten().clone() for p in network.parameters() if p.grad is not None]
            )

        still = _apart(gradient(len(x)), gradient(self.parts))
        for layer in layers:
            layer.training = True
        accumulated = gradient(self.parts)
        whole = gradient(len(x))
        for layer in layers:
            _as_ghosts(layer, self.parts)
        found = {
            "still": still,
            "whole": _apart(whole, accumulated),
            "ghost": _apart(gradient(len(x)), accumulated),
        }
        for name, value in found.items():
            yield Record(step.number, "", f"accumulation/{name}", value)


def _as_ghosts(layer: nn.Module, size: int) -> None:
    if not isinstance(layer, ours._BatchNorm):
        raise ValueError(f"{type(layer).__name__} cannot normalise in parts: it is not torch's own")
    layer.statistics = Ghost(size)


def _apart(one: Tensor, accumulated: Tensor) -> float:
    return float((one - accumulated).norm() / accumulated.norm())
