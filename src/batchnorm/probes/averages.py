"""Averages of weights, and the statistics that they are evaluated with."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.probes.performance import Loss, evaluate
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record
from batchnorm.transforms.average import STATISTICS, average

__all__ = ["Averages"]

State = dict[str, Tensor]


class Averages(Probe):
    """Moving and equal averages of the weights, with each kind of statistics for them.

    ``ema`` is θ̄ ← d·θ̄ + (1 − d)·θ after every update, from the first one's weights; ``swa`` is
    the equal mean of the weights after the updates in ``snapshots``; ``last`` the network as it
    is. At some steps each is evaluated with the three statistics of :func:`average`.

    References:
        Equal means: arXiv 1803.05407.
    """

    name = "averages"

    def __init__(
        self,
        decay: float,
        snapshots: Collection[int],
        at: Collection[int],
        batches: Sequence[Tensor],
        test: tuple[Tensor, Tensor],
        loss_function: Loss,
    ) -> None:
        """Evaluate on ``test`` at the steps ``at``; recompute statistics from ``batches``."""
        self.decay, self.snapshots, self.at, self.batches = decay, snapshots, at, batches
        self.test, self.loss_function = test, loss_function
        self._means: dict[str, State] = {}
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        """The averages, and of how many networks the equal one is."""
        return {"means": self._means, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._means, self._taken = state["means"], state["taken"]

    def before_update(self, step: Step) -> Iterator[Record]:
        """Loss and accuracy of each average with each of the statistics."""
        if step.number not in self.at:
            return
        current = step.model.state_dict()
        for name, mean in {"last": current, **self._means}.items():
            for statistics in STATISTICS:
                if name == "last" and statistics == "average":
                    continue  # of one network: its own
                network = copy.deepcopy(step.model)
                average(
                    network,
                    [mean, current],
                    [1, 0],  # the current network gives nothing but the statistics to copy
                    statistics=statistics,
                    loader=self.batches if statistics == "recompute" else None,
                )
                found = evaluate(network, *self.test, self.loss_function)
                for what, value in found.items():
                    yield Record(step.number, "", f"{name}/{statistics}/{what}", value)

    def after_update(self, step: Step) -> Iterator[Record]:
        """Take the new weights, and the statistics that went with this step."""
        state = step.model.state_dict()
        self._mix("ema", state, 1 - self.decay)
        if step.number + 1 in self.snapshots:
            self._taken += 1
            self._mix("swa", state, 1 / self._taken)
        yield from ()

    def _mix(self, name: str, state: Mapping[str, Tensor], share: float) -> None:
        new = {key: v.double() if v.is_floating_point() else v for key, v in state.items()}
        if name not in self._means:
            self._means[name] = {key: value.clone() for key, value in new.items()}
            return
        with torch.no_grad():
            for key, value in self._means[name].items():
                if value.is_floating_point():
                    value.lerp_(new[key], share)
                else:
                    value.copy_(new[key])
