"""Average the weights of several networks, and give the average statistics that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.transforms.recalibrate import recalibrate

__all__ = ["STATISTICS", "average"]

STATISTICS = ("recompute", "average", "copy")
"""Where the statistics of an average come from."""


def average(
    model: nn.Module,
    snapshots: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    *,
    statistics: str = "recompute",
    loader: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> None:
    r"""Load the average of several state dicts into a network.

    .. math:: \theta = \sum_i w_i\,\theta_i \Big/ \sum_i w_i

    Equal weights are stochastic weight averaging; ``[decay, 1 - decay]`` over the average so far
    and the network in training is one step of an exponential moving average. The statistics:

    - ``recompute``: of the averaged weights, over the data of ``loader``, by
      :func:`recalibrate`. The activations of an average are not the average of activations, so
      that only this is right whatever was averaged.
    - ``average``: averaged like the weights. They lag twice, as running averages behind the
      weights and as averages of those: for a moving average during training they can be worse
      than copied ones. Good enough where the networks hardly differ, as late in training.
    - ``copy``: those of the last snapshot. Good enough there too.

    Args:
        model: The network to load into, changed in place; it may be one of those averaged.
        snapshots: State dicts of one architecture.
        weights: Not negative, one for each snapshot. Default: equal.
        statistics: ``"recompute"``, ``"average"`` or ``"copy"``. It is about all floating
            buffers; other buffers, such as ``num_batches_tracked``, are the last snapshot's.
        loader: To recompute from.
        forward: As in :func:`recalibrate`.

    Raises:
        ValueError: An argument is wrong, the snapshots are not of this network or average to
            what is not finite, or as
            :func:`recalibrate`. Nothing is changed then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(1)
        >>> one = {name: value.clone() for name, value in layer.state_dict().items()}
        >>> two = {name: value + 2 for name, value in one.items()}
        >>> average(layer, [one, two], [0.25, 0.75], statistics="average")
        >>> layer.weight.item(), layer.running_var.item(), layer.num_batches_tracked.item()
        (2.5, 2.5, 2)

    References:
        Izmailov et al. 2018, *Averaging Weights Leads to Wider Optima*, arXiv 1803.05407,
        section 3.2.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, got {statistics!r}")
    if (statistics == "recompute") != (loader is not None):
        raise ValueError(
            "statistics='recompute' needs a loader, and only it; the others are 'average' and "
            f"'copy': got {statistics!r} and loader={loader!r}"
        )
    if not snapshots:
        raise ValueError("there is no snapshot to average")
    weights = [1.0] * len(snapshots) if weights is None else weights
    if len(weights) != len(snapshots) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"weights must be {len(snapshots)} numbers that are not negative, one for each "
            f"snapshot, got {list(weights)}"
        )
    target = model.state_dict()
    for i, snapshot in enumerate(snapshots):
        odd = {n for n in target.keys() | snapshot if _shape(target, n) != _shape(snapshot, n)}
        if odd:
            raise ValueError(
                f"snapshot {i} is of another network: {', '.join(sorted(odd)[:5])} "
                "not there or of another shape"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shares = [weight / sum(weights) for weight in weights]
    before = {name: value.clone() for name, value in target.items()}
    try:
        with torch.no_grad():
            for name, value in target.items():
                last = snapshots[-1][name]
                if not value.is_floating_point() or (
                    name not in parameters and statistics == "copy"
                ):
                    mean = last
                else:
                    mean = torch.zeros_like(value, dtype=torch.float64)
                    for share, snapshot in zip(shares, snapshots, strict=True):
                        mean.add_(snapshot[name].to(mean), alpha=share)
                kept = name in parameters or statistics != "recompute"
                if kept and value.is_floating_point() and not mean.isfinite().all():
                    raise ValueError(
                        f"the average of {name} is not finite; leave out the snapshot where it is "
                        "not"
                    )
                value.copy_(mean)
        if loader is not None:
            recalibrate(model, loader, forward=forward)
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                target[name].copy_(value)
        raise


def _shape(state: Mapping[str, Tensor], name: str) -> object:
    return state[name].shape if name in state else None
