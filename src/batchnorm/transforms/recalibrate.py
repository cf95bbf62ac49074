"""Replace running statistics by those of a whole data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from batchnorm import functional
from batchnorm.functional import Moments
from batchnorm.nn import batchnorm as ours
from batchnorm.nn.guard import Guard
from batchnorm.nn.statistics import Ghost, Renorm, Running, Sync
from batchnorm.transforms.convert import convert, revert
from batchnorm.transforms.dataflow import preserved
from batchnorm.transforms.freeze import statistics_frozen
from batchnorm.transforms.layers import batch_norms

__all__ = ["METHODS", "Recalibration", "recalibrate"]

METHODS = ("pooled", "mean")
"""How the moments of the batches become those of the population."""


@dataclass(frozen=True)
class Recalibration:
    """What :func:`recalibrate` did."""

    batches: int
    """How many batches the loader yielded, or the loaders of all processes."""
    values: dict[str, int]
    """How many values of each channel the new statistics are of, by the name of the layer."""
    left: dict[str, str]
    """Why a layer kept its running statistics, by its name."""


@dataclass
class _Population:
    """The moments of all that one layer saw, in float64."""

    calls: int = 0
    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    within: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, batch: Moments) -> None:
        n = int(batch.n)
        if n:
            mean, var = batch.mean.double(), batch.var.double()
            self.merge(_Population(1, n, mean, var * n, var * (n * n / (n - 1))))

    def merge(self, other: _Population) -> None:
        if other.n == 0:
            return
        if self.n == 0:
            self.mean, self.squares, self.within = (
                torch.zeros_like(t) for t in (other.mean, other.squares, other.within)
            )
        total = self.n + other.n
        # Merged as Chan, Golub & LeVeque 1983 do: no difference of two large sums.
        distance = other.mean - self.mean
        self.squares.add_(other.squares)
        self.squares.addcmul_(distance, distance, value=self.n * other.n / total)
        self.within.add_(other.within)
        self.mean.add_(distance, alpha=other.n / total)
        self.n = total
        self.calls += other.calls

    def cpu(self) -> _Population:
        tensors = (self.mean.cpu(), self.squares.cpu(), self.within.cpu())
        return _Population(self.calls, self.n, *tensors)

    def statistics(self, method: str) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased variance."""
        if method == "pooled":
            return self.mean, self.squares / (self.n - 1)
        return self.mean, self.within / self.n


class _Collector(Guard):
    """Takes the moments that a layer of ours would track, and lets it track none."""

    def __init__(self, population: _Population) -> None:
        super().__init__()
        object.__setattr__(self, "population", population)

    def check(self, moments: Moments, running: Running, layer: object) -> None:
        population: _Population = self.population  # type: ignore[attr-defined]
        population.add(moments)


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    method: str = "pooled",
    progress: Callable[[int, int | None], object] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Recalibration:
    r"""Replace the running statistics by the moments of the whole data, with frozen weights.

    Running averages lag behind the weights, and average batches of different weights. Here every
    batch b of the loader goes through the network, and from its mean μ_b, biased variance σ²_b
    and number of values n_b in each layer, N = Σ n_b in all, come

    .. math::

        \bar\mu = \frac1N \sum_b n_b\,\mu_b, \qquad
        \bar\sigma^2_{\mathrm{pooled}} = \frac1{N-1} \sum_b n_b
            \left(\sigma^2_b + (\mu_b - \bar\mu)^2\right), \qquad
        \bar\sigma^2_{\mathrm{mean}} = \frac1N \sum_b n_b\,\frac{n_b}{n_b - 1}\,\sigma^2_b

    ``pooled`` is the variance of all values together, whatever the batches. ``mean`` is
    Algorithm 2 of [P1], each batch counting by its size, which are all one m there. The default
    is ``pooled``, because the factor n/(n−1) of the other makes up for what a batch does not
    show only if its values are independent: the positions of an image are not, and then
    ``mean`` leaves out how the batches differ, the more so the smaller they are.

    While it runs, each layer normalises by the whole batch, so that the layers behind it see
    what they saw in training (*nested* statistics), and everything else is in evaluation:
    dropout is off, as it will be when the statistics are used. A layer with :class:`Lp`
    statistics keeps its scale; ``Ghost``, ``Renorm`` and ``Sync`` are set aside.

    In a process group, as under :class:`torch.nn.parallel.DistributedDataParallel`, every process
    calls it with its share of the data, of any number of batches or none. Then b runs over the
    batches of all, merged in float64, and all end with the same bits. Each process normalises by
    its own batches meanwhile, whatever ``Sync`` says, as the others need not have as many.

    Left alone are layers that are frozen: by :func:`freeze` or ``Frozen()``, by a momentum of 0,
    or in evaluation inside a network in training; and those that keep no running statistics or
    that no batch reaches. A layer used twice gets the moments of both uses. Sums are float64.
    Running out of anything, an error or an interrupt leave the network exactly as it was, on
    every process.

    Args:
        model: The network; its running statistics are changed in place, and
            ``num_batches_tracked`` grows as in training. Nothing else changes, modes and
            torch's random state included.
        loader: Batches, on any device: they are moved to the network's. A few thousand samples
            do: ``itertools.islice(loader, 200)``. A list or tuple counts as (input, ...), of
            which the network gets the first. Of a dict it gets what it has arguments for.
        forward: For any other batch, how to run the network: ``forward(model, batch)``.
        method: ``"pooled"`` or ``"mean"``.
        progress: Called as ``progress(done, total)`` after each batch of this process; ``total``
            is None where the loader has no length.
        process_group: The processes. Default: all, if :mod:`torch.distributed` is initialised.
            One process by itself: ``dist.new_group([rank], use_local_synchronization=True)``.

    Returns:
        The number of batches, how many values went into each layer, and what was left and why.

    Raises:
        ValueError: ``method`` is another, there is nothing to recalibrate or to run, a batch
            leaves a layer one value per channel, or new statistics are not finite.
        TypeError: It is not clear what of a batch is the input.
        RuntimeError: Another process failed, or did not call it within the group's time-out.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> batches = [(torch.randn(8, 2), torch.zeros(8)) for _ in range(4)]
        >>> recalibrate(model, batches)
        Recalibration(batches=4, values={'1': 32}, left={})

    References:
        [P1] Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2. Pooled: Wu & Johnson 2021,
        *Rethinking "Batch" in BatchNorm*, arXiv 2105.07576, section 3.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if functional.processes(process_group)[1] == 1:
        return alone(model, loader, forward=forward, method=method, progress=progress)
    seen = _seen_by_all(process_group, lambda: _see(model, loader, forward, progress))
    return _conclude(seen, method)


def alone(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    method: str = "pooled",
    progress: Callable[[int, int | None], object] | None = None,
) -> Recalibration:
    """Recalibrate by this process's data, in whatever group it is."""
    return _conclude(_see(model, loader, forward, progress), method)


@dataclass
class _Seen:
    """What a network saw of the data."""

    layers: dict[str, _BatchNorm]
    left: dict[str, str]
    populations: dict[str, _Population]
    batches: int = 0


def _see(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Callable[[nn.Module, Any], object] | None,
    progress: Callable[[int, int | None], object] | None,
) -> _Seen:
    """Run all batches through the network, which is afterwards as it was."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    layers = batch_norms(model)
    left = {name: reason for name, layer in layers.items() if (reason := left_alone(model, layer))}
    seen = _Seen(layers, left, {name: _Population() for name in layers if name not in left})
    if not seen.populations:
        reasons = "; ".join(f"{name or 'the layer'} {reason}" for name, reason in left.items())
        raise ValueError(f"no layer to recalibrate: {reasons}")
    for name in seen.populations:
        _refuse_torchs_sync(name, layers[name])
    total = len(loader) if isinstance(loader, Sized) else None
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.no_grad())
        model.eval()
        for name, population in seen.populations.items():
            stack.enter_context(_Observed(name, layers[name], population))
        for batch in loader:
            run(model, batch, forward)
            seen.batches += 1
            if progress is not None:
                progress(seen.batches, total)
    return seen


def _refuse_torchs_sync(name: str, layer: _BatchNorm) -> None:
    if isinstance(layer, nn.SyncBatchNorm) and functional.processes(layer.process_group)[1] > 1:
        raise ValueError(
            f"{name or 'the layer'} is a {type(layer).__name__}, which waits for the other "
            "processes at every batch; batchnorm.synchronize(model) makes it one that need not"
        )


def _seen_by_all(group: dist.ProcessGroup | None, see: Callable[[], _Seen]) -> _Seen:
    """Put together what the processes saw; if one failed, all fail."""
    ranks = dist.get_process_group_ranks(group)
    seen = failure = None
    try:
        seen = see()
    except Exception as error:  # an interrupt ends this process, which the others notice
        failure = error
    share = (
        f"{type(failure).__name__}: {failure}"
        if seen is None
        else (seen.batches, {name: p.cpu() for name, p in seen.populations.items()})
    )
    shares: list[Any] = [None] * len(ranks)
    try:
        dist.all_gather_object(shares, share, group)
    except RuntimeError as error:
        error.add_note(
            "recalibrate() puts together what all processes of a group saw, and one of them ended "
            "or did not call it; nothing was changed here. process_group= says which call it"
        )
        raise
    if seen is None:
        assert failure is not None
        raise failure
    failed = [f"rank {r} ({s})" for r, s in zip(ranks, shares, strict=True) if isinstance(s, str)]
    if failed:
        raise RuntimeError(
            f"recalibrate() failed on {', '.join(failed)}, so that nothing was changed on any rank"
        )
    for rank, (_, populations) in zip(ranks, shares, strict=True):
        if populations.keys() != shares[0][1].keys():
            raise RuntimeError(
                f"the processes would recalibrate different layers: rank {ranks[0]} "
                f"{', '.join(shares[0][1])}; rank {rank} {', '.join(populations)}. Give all "
                "of them the same network, in the same modes"
            )
    # In the order of ranks, so that all get the same bits.
    for name in seen.populations:
        merged = seen.populations[name] = _Population()
        for _, populations in shares:
            merged.merge(populations[name])
    seen.batches = sum(batches for batches, _ in shares)
    return seen


def _conclude(seen: _Seen, method: str) -> Recalibration:
    """Write the new statistics and report."""
    if seen.batches == 0:
        raise ValueError(
            "the loader yielded no batch; an iterator can be run through only once, pass the "
            "loader itself"
        )
    populations = seen.populations
    unseen = {name: "was reached by no batch" for name, p in populations.items() if p.n == 0}
    values = {name: p.n for name, p in populations.items() if p.n}
    if not values:
        raise ValueError(
            f"no batch reached any of {', '.join(populations)}; pass forward=, the way that the "
            "network is used"
        )
    _write([(name, seen.layers[name], populations[name]) for name in values], method)
    return Recalibration(seen.batches, values, seen.left | unseen)


class _Observed:
    """One layer normalising by its batch, its moments collected."""

    def __init__(self, name: str, layer: _BatchNorm, population: _Population) -> None:
        self._name, self._layer, self._population = name, layer, population

    def __enter__(self) -> None:
        layer = self._layer
        # Torch's own layer runs as ours: the same results, and it tells its moments, of float64,
        # where torch's would need a second pass over x or round them to the type of its buffers.
        self._borrowed = not isinstance(layer, ours._BatchNorm) and isinstance(
            convert(layer), ours._BatchNorm
        )
        if isinstance(layer, ours._BatchNorm):
            self._guard, self._statistics = layer.guard, layer.statistics
            layer.guard = _Collector(self._population)
            if isinstance(layer.statistics, Ghost | Renorm | Sync):
                layer.statistics = None
        self._hook = layer.register_forward_pre_hook(self._before, with_kwargs=True)
        layer.training = True

    def __exit__(self, *error: object) -> None:
        layer = self._layer
        self._hook.remove()
        if isinstance(layer, ours._BatchNorm):
            layer.guard, layer.statistics = self._guard, self._statistics
            if self._borrowed:
                revert(layer)

    def _before(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = inputs[0] if inputs else next(iter(named.values()))
        if x.numel() == 0:
            return
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"{self._name or 'the layer'} got one value per channel (input "
                f"{tuple(x.shape)}), which has no variance; leave such a batch out "
                "(DataLoader's drop_last=True)"
            )
        if not isinstance(layer, ours._BatchNorm):
            self._population.add(functional.moments(x))


def left_alone(model: nn.Module, layer: _BatchNorm) -> str:
    """Say why the running statistics of a layer are to stay as they are, or nothing."""
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics"
    if statistics_frozen(layer):
        return "is frozen"
    if layer.momentum == 0:
        return "is frozen by a momentum of 0"
    if model.training and not layer.training:
        return "is frozen: in evaluation, the network in training"
    return ""


def run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], object] | None) -> object:
    """Run the network on a batch of any structure, on the network's device."""
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    batch = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            return model(**batch)
        names = [p.name for p in parameters]
        chosen = {name: batch[name] for name in names if name in batch}
        if not chosen:
            raise TypeError(
                f"the batch has {', '.join(map(repr, batch))}, but {type(model).__name__} takes "
                f"{', '.join(names)}; say which is which: "
                "forward=lambda model, batch: model(batch[...])"
            )
        return model(**chosen)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"a batch is a {type(batch).__name__}, of which it is not clear what the input is; "
        "pass forward=lambda model, batch: model(...)"
    )


def _write(found: list[tuple[str, _BatchNorm, _Population]], method: str) -> None:
    """Write all statistics, or none."""
    writes: list[tuple[Tensor, Tensor]] = []
    for name, layer, population in found:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        buffers = (layer.running_mean, layer.running_var)
        for buffer, value in zip(buffers, population.statistics(method), strict=True):
            value = value.to(buffer)
            if not value.isfinite().all():
                raise ValueError(
                    f"the statistics of {name or 'the layer'} are not finite; look for NaN or inf "
                    "in the data, or for overflow in the layers before it. Nothing was changed"
                )
            writes.append((buffer, value))
        if layer.num_batches_tracked is not None:
            writes.append((layer.num_batches_tracked, layer.num_batches_tracked + population.calls))
    before = [(buffer, buffer.clone()) for buffer, _ in writes]
    try:
        for buffer, value in writes:
            buffer.copy_(value)
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
