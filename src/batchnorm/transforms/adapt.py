"""Adapt a trained network to data of another kind, at test time, and take it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.nn.statistics import Sync
from batchnorm.transforms.dataflow import preserved
from batchnorm.transforms.layers import batch_norms, require_finite
from batchnorm.transforms.recalibrate import alone, left_alone, run

__all__ = ["Adaptation", "adapt"]


class Adaptation:
    """What :func:`adapt` changed, and the way back."""

    def __init__(self, model: nn.Module) -> None:
        self.samples = 0
        self.entropies: list[float] = []
        """The mean entropy of the predictions for each batch, in nats, where it was minimised."""
        self._before = [
            (tensor, tensor.detach().clone())
            for layer in batch_norms(model).values()
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        ]

    def reset(self) -> None:
        """Put statistics, γ and β back to what they were before."""
        with torch.no_grad():
            for tensor, value in self._before:
                tensor.copy_(value)


def adapt(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    prior: float = 16,
    entropy_lr: float | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Adaptation:
    r"""Move statistics, and if asked γ and β, to unlabelled data of the kind to be met.

    .. math::

        \bar\mu = \frac{N}{N+n}\,\mu_s + \frac{n}{N+n}\,\mu_t, \qquad
        \bar\sigma^2 = \frac{N}{N+n}\,\sigma^2_s + \frac{n}{N+n}\,\sigma^2_t

    s are the running statistics as they are, which count as N samples, and t those of the n
    samples in the loader, taken as :func:`recalibrate` does: while they are, every layer
    normalises by the batch alone, so that the mixtures of deep layers fit what they then see only
    roughly. With few samples (n below N) a mixture at every layer's turn has fewer errors; the
    study ``inference`` measures how many.

    With ``entropy_lr`` γ and β first take one step of Adam for each batch, down the mean entropy
    of the predictions, :math:`-\sum_c p_c \log p_c`, every layer normalising by the batch. What
    is frozen stays, statistics or γ and β. In a process group each process adapts to its own data.

    Args:
        model: A classifier, or any network where only the statistics are adapted.
        loader: Batches as :func:`recalibrate` takes them; labels are not looked at.
        prior: N, 0 or more. 0: only the new data counts. Small batches need more of it.
        entropy_lr: Learning rate for γ and β; the usual is 1e-3. Default: they stay.
        forward: How to run the network on a batch, returning logits of shape (N, classes, \*).

    Returns:
        The way back: ``reset()``.

    Raises:
        ValueError: As :func:`recalibrate`, ``prior`` or ``entropy_lr`` is out of range, a
            statistic that would be mixed is not finite, no γ or β can learn, the
            entropy is not finite, or the loader can be run through only once but is needed
            twice. Nothing is changed then.
        TypeError: As :func:`recalibrate`, or what the network returns is not one tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(1)
        >>> done = adapt(layer, [torch.tensor([[3.0], [5.0]])], prior=2)
        >>> layer.running_mean.item()
        2.0
        >>> done.reset()
        >>> layer.running_mean.item()
        0.0

    References:
        Mixture: Schneider et al. 2020, arXiv 2006.16971. Entropy: Wang et al. 2021, *TENT*,
        arXiv 2006.10726, whose statistics are those of each batch.
    """
    if not 0 <= prior < math.inf:
        raise ValueError(f"prior must be 0 or more samples, got {prior}")
    if entropy_lr is not None and not 0 < entropy_lr < math.inf:
        raise ValueError(f"entropy_lr must be above 0 and finite, or None, got {entropy_lr}")
    if entropy_lr is not None and iter(loader) is loader:
        raise ValueError(
            "the loader can be run through only once, but γ and β are adapted first and the "
            "statistics then; pass a DataLoader or a list"
        )
    adaptation = Adaptation(model)
    layers = batch_norms(model)
    if prior:
        require_finite({n: layer for n, layer in layers.items() if not left_alone(model, layer)})
    source = {
        name: (layer.running_mean.double().clone(), layer.running_var.double().clone())
        for name, layer in layers.items()
        if layer.running_mean is not None and layer.running_var is not None
    }

    def counted() -> Iterator[Any]:
        for batch in loader:
            tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
            first = next(tensors, None)
            if first is None:
                raise TypeError(
                    f"a batch, a {type(batch).__name__}, holds no tensor, so that its samples "
                    "cannot be counted; have the loader yield tensors"
                )
            adaptation.samples += len(first)
            yield batch

    try:
        if entropy_lr is not None:
            _minimize_entropy(model, loader, entropy_lr, forward, adaptation.entropies)
        report = alone(model, counted(), forward=forward)
        keep = prior / (prior + adaptation.samples)
        with torch.no_grad():
            for name in report.values:
                buffers = (layers[name].running_mean, layers[name].running_var)
                for buffer, old in zip(buffers, source[name], strict=True):
                    assert buffer is not None
                    mixed = buffer.double()
                    if prior:  # 0 keeps nothing, not even what is not finite
                        mixed = keep * old + (1 - keep) * mixed
                    buffer.copy_(mixed)
    except BaseException:
        adaptation.reset()
        raise
    return adaptation


def _minimize_entropy(
    model: nn.Module,
    loader: Iterable[Any],
    lr: float,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    entropies: list[float],
) -> None:
    held = {layer for layer in batch_norms(model).values() if left_alone(model, layer)}
    learning = [
        parameter
        for layer in batch_norms(model).values()
        for parameter in layer.parameters(recurse=False)
        if parameter.requires_grad
    ]
    if not learning:
        raise ValueError(
            "no γ or β can learn: the batch norms have none, or they are frozen; unfreeze them, "
            "or adapt only the statistics with entropy_lr=None"
        )
    optimiser = torch.optim.Adam(learning, lr)
    with ExitStack() as stack:
        for parameter in learning:  # may hold gradients, which are not ours
            stack.callback(setattr, parameter, "grad", parameter.grad)
        stack.enter_context(preserved(model))
        stack.enter_context(torch.enable_grad())
        model.eval()
        for layer in batch_norms(model).values():
            layer.training = layer not in held
            if isinstance(getattr(layer, "statistics", None), Sync):
                stack.callback(setattr, layer, "statistics", layer.statistics)
                layer.statistics = None  # type: ignore[assignment]
        for batch in loader:
            logits = run(model, batch, forward)
            if not isinstance(logits, Tensor):
                raise TypeError(
                    f"the network returned a {type(logits).__name__}; pass forward=, returning "
                    "the logits"
                )
            logs = logits.log_softmax(1)
            entropy = -(logs.exp() * logs).sum(1).mean()
            if not entropy.isfinite():
                raise ValueError(
                    f"the entropy of batch {len(entropies)} is {entropy.item()}; lower entropy_lr"
                )
            gradients = torch.autograd.grad(entropy, learning, allow_unused=True)
            for parameter, gradient in zip(learning, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            entropies.append(entropy.item())
