"""What evaluation can normalise by: averages, recomputed moments, or the batch to predict."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import functional
from batchnorm.probes.layers import Layer
from batchnorm.probes.performance import Loss, evaluate, scores
from batchnorm.probes.probe import Probe
from batchnorm.probes.step import Step
from batchnorm.records import Record
from batchnorm.transforms.adapt import adapt
from batchnorm.transforms.dataflow import preserved
from batchnorm.transforms.layers import batch_norms
from batchnorm.transforms.recalibrate import left_alone, recalibrate

__all__ = ["Population", "TestBatches", "averaged_as"]

RECOMPUTED = {"algorithm2": "mean", "pooled": "pooled"}
"""Name of the statistics in records → method of :func:`recalibrate`."""


def averaged_as(momentum: float | None) -> str:
    """The name in records of a running average of this momentum."""
    return f"running-{'cumulative' if momentum is None else momentum}"


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms whose running statistics move, the network being in training."""
    found = batch_norms(model)
    return {name: layer for name, layer in found.items() if not left_alone(model, layer)}


def _records(step: Step, name: str, found: Mapping[str, float]) -> Iterator[Record]:
    for what, value in found.items():
        yield Record(step.number, "", f"{name}/{what}", value)


class Population(Probe):
    """One network evaluated with several statistics of the population.

    From the batches that training sees, of mean μ_B and unbiased variance σ²_B in each layer, it
    keeps a running average s ← (1 − m)·s + m·s_B for each momentum m, from 0 and 1 as layers do;
    ``None`` is the mean of all batches so far. At some steps the network is evaluated with each
    of them, and with the statistics that :func:`recalibrate` computes by Algorithm 2 and pooled.
    """

    name = "population"

    def __init__(
        self,
        momenta: Sequence[float | None],
        at: Collection[int],
        batches: Sequence[Tensor],
        test: tuple[Tensor, Tensor],
        loss_function: Loss,
    ) -> None:
        """Evaluate on ``test`` at the steps ``at``; recompute from ``batches``."""
        self.momenta, self.at, self.batches = momenta, at, batches
        self.test, self.loss_function = test, loss_function
        self._count: dict[str, int] = {}
        self._averages: dict[str, dict[str, list[Tensor]]] = {averaged_as(m): {} for m in momenta}

    def state_dict(self) -> dict[str, Any]:
        """The averages, and of how many batches of each layer they are."""
        return {"count": self._count, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._count, self._averages = state["count"], state["averages"]

    def modules(self, model: nn.Module, layers: list[Layer]) -> list[nn.Module]:
        """The batch norms."""
        return list(_layers(model).values())

    def before_update(self, step: Step) -> Iterator[Record]:
        """Loss and accuracy with each of the statistics; they already hold this batch."""
        layers = _layers(step.model)
        for name, layer in layers.items():
            if layer in step.seen:
                self._add(name, functional.moments(step.seen[layer].input))
        if step.number not in self.at:
            return
        model = step.model
        for name, averages in self._averages.items():
            with preserved(model), torch.no_grad():
                for key, values in averages.items():
                    for buffer, value in zip(_buffers(layers[key]), values, strict=True):
                        buffer.copy_(value)
                yield from _records(step, name, evaluate(model, *self.test, self.loss_function))
        for name, method in RECOMPUTED.items():
            with preserved(model):
                recalibrate(model, self.batches, method=method)
                yield from _records(step, name, evaluate(model, *self.test, self.loss_function))

    def _add(self, name: str, moments: functional.Moments) -> None:
        n = int(moments.n)
        batch = (moments.mean.double(), moments.var.double() * (n / (n - 1)))
        self._count[name] = self._count.get(name, 0) + 1
        for momentum in self.momenta:
            averages = self._averages[averaged_as(momentum)]
            if name not in averages:
                averages[name] = [torch.zeros_like(batch[0]), torch.ones_like(batch[1])]
            share = 1 / self._count[name] if momentum is None else momentum
            for value, new in zip(averages[name], batch, strict=True):
                value.lerp_(new, share)


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _batches(x: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of ``size`` exactly, and how many at the start of each were in the last one too."""
    for start in range(0, len(x), size):
        first = min(start, len(x) - size)
        yield x[first : first + size], start - first


class TestBatches(Probe):
    """Predictions that use the test batch itself, by its size, on several test sets.

    Beside the layers' own running statistics (``running``): those of the batch that is predicted
    (``batch-n``), and of its mixture with the running ones, N/(N + n) to n/(N + n), once layer by
    layer (``mixture-n``: what a layer sees has been normalised by the mixture), once afterwards
    (``adapted-n``: by :func:`adapt`, which measures as recalibration does and then mixes). The
    last batch is filled up with examples that had their prediction before.

    References:
        arXiv 2006.16971.
    """

    __test__ = False  # for pytest: not a test
    name = "test_batches"

    def __init__(
        self,
        sets: Mapping[str, tuple[Tensor, Tensor]],
        at: Collection[int],
        sizes: Sequence[int],
        adapted: Collection[int],
        loss_function: Loss,
        *,
        prior: float,
    ) -> None:
        """Predict the ``sets`` at the steps ``at``; ``prior`` is N.

        ``adapted`` are the sizes at which :func:`adapt`, which is slow, is tried too. Sizes that
        are more than a set has, or that leave a channel one value, are left out.
        """
        self.sets, self.at, self.sizes, self.adapted = sets, at, sizes, adapted
        self.loss_function, self.prior = loss_function, prior

    def before_update(self, step: Step) -> Iterator[Record]:
        """Loss and accuracy for each set and each way to normalise."""
        if step.number not in self.at:
            return
        for name, (x, y) in self.sets.items():
            found = evaluate(step.model, x, y, self.loss_function)
            yield from _records(step, f"{name}/running", found)
            for size in self.sizes:
                if size > len(x):
                    continue
                ways = {"batch": self._by_batch, "mixture": self._mixed}
                if size in self.adapted:
                    ways["adapted"] = self._adapted
                for way, predict in ways.items():
                    try:
                        outputs = predict(step.model, x, size)
                    except ValueError:
                        if size > 1:
                            raise
                        continue  # a single value has no variance
                    scored = scores(outputs, y, self.loss_function)
                    yield from _records(step, f"{name}/{way}-{size}", scored)

    @staticmethod
    def _by_batch(model: nn.Module, x: Tensor, size: int) -> Tensor:
        layers = _layers(model).values()
        with preserved(model), torch.no_grad():
            model.eval()
            for layer in layers:
                layer.training = True
            return torch.cat([model(batch)[again:] for batch, again in _batches(x, size)])

    def _mixed(self, model: nn.Module, x: Tensor, size: int) -> Tensor:
        source = {
            layer: [buffer.clone() for buffer in _buffers(layer)]
            for layer in _layers(model).values()
        }
        share = size / (self.prior + size)

        def mix(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, _BatchNorm)
            mean, var, _ = functional.moments(inputs[0])
            for buffer, old, new in zip(_buffers(layer), source[layer], (mean, var), strict=True):
                buffer.copy_(old.double().lerp(new, share))

        with ExitStack() as stack:
            stack.enter_context(preserved(model))
            stack.enter_context(torch.no_grad())
            model.eval()
            for layer in source:
                stack.callback(layer.register_forward_pre_hook(mix).remove)
            return torch.cat([model(batch)[again:] for batch, again in _batches(x, size)])

    def _adapted(self, model: nn.Module, x: Tensor, size: int) -> Tensor:
        parts = []
        with preserved(model), torch.no_grad():
            model.eval()
            for batch, again in _batches(x, size):
                adaptation = adapt(model, [batch], prior=self.prior)
                parts.append(model(batch)[again:])
                adaptation.reset()
        return torch.cat(parts)
