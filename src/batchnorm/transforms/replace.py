"""Replace the batch norms of a network by another normalisation or by none, and take it back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.norms import NORMS, make_norm
from batchnorm.transforms.dataflow import preserved, trace
from batchnorm.transforms.layers import batch_norms
from batchnorm.transforms.tail import tail

__all__ = ["Replacement", "channels_and_rank", "replace"]


class Replacement:
    """What :func:`replace` did, and the way back."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        """One sentence for each change."""
        self._undo: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Put the layers back that were there, as they are now; restored biases go."""
        while self._undo:
            self._undo.pop()()


def channels_and_rank(linear: nn.Module) -> tuple[int, int]:
    """Output channels and number of spatial dimensions of a linear operation."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, 0
    assert isinstance(linear, nn.modules.conv._ConvNd)
    return linear.out_channels, len(linear.kernel_size)


def replace(model: nn.Module, norm: str, *example: Any, **named: Any) -> Replacement:
    r"""Replace batch norms by ``group`` or ``layer`` norms or by ``none``; or group norms by them.

    .. math:: y = \gamma\,\frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta

    with the moments of each sample and group g of channels, in place of those of the batch:

    - ``group``: 32 groups, or the largest power of 2 that leaves each two channels or more;
    - ``layer``: one group, of all channels and positions;
    - ``none``: the value itself. A linear operation that had given up its bias for the batch
      norm behind it gets it again, with the value of β;
    - ``batch``: every ``GroupNorm``, of one or more groups, becomes a batch norm of ours.

    γ, β (or that there are none), ε, type, device, mode and ``requires_grad`` go along; γ is lost
    with ``none``. Running statistics have no place in a group norm, and those of a new batch norm
    are 0 and 1 until the network is trained or :func:`recalibrate` measures them. An activation
    in the layer stays, as a module behind it. Nothing of this keeps what the network computes:
    train it, or train it on. An optimiser made before holds parameters that nothing uses any more.

    Args:
        model: The network, in any mode, changed in place.
        norm: ``"none"``, ``"layer"``, ``"group"`` or ``"batch"``.
        *example: What to call the network with, to see what feeds what.
        **named: What to call it with by name.

    Returns:
        One sentence for each change; ``undo()`` puts back the very layers that were there.

    Raises:
        ValueError: ``norm`` is unknown, there is nothing to replace, or a layer derives from
            torch's batch norm and does more than its children account for. Nothing is changed
            then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
        >>> done = replace(model, "group", torch.randn(2, 3, 8, 8))
        >>> model[1].num_groups, done.changes
        (32, ['1: BatchNorm2d replaced by group norm'])
        >>> done.undo()
        >>> type(model[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>

    References:
        Wu & He 2018, *Group Normalization*, arXiv 1803.08494.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    layers = _to_replace(model, norm)
    seen = _observe(model, layers, example, named)
    made = {layer: _make(norm, layer, name, seen) for name, layer in layers.items()}
    biases: dict[_BatchNorm, list[tuple[str, nn.Module]]] = {}
    if norm == "none":
        for flow in trace(model, *example, **named):
            layer = layers.get(flow.norm or "")
            if isinstance(layer, _BatchNorm) and getattr(flow.module, "bias", None) is None:
                biases.setdefault(layer, []).append((flow.name, flow.module))
    done = Replacement()
    by = "identity" if norm == "none" else f"{norm} norm"
    parents = [(name, parent) for name, parent in model.named_modules() if parent not in made]
    for prefix, parent in parents:
        for child, layer in list(parent._modules.items()):
            if layer not in made:
                continue
            parent._modules[child] = made[layer]
            done._undo.append(partial(parent._modules.__setitem__, child, layer))
            change = f"{prefix}.{child}".lstrip(".") + f": {type(layer).__name__} replaced by {by}"
            for name, linear in biases.pop(layer, ()):
                done._undo.append(partial(linear._parameters.__setitem__, "bias", None))
                linear._parameters["bias"] = _bias(linear, layer)
                change += f", bias of {name} restored"
            done.changes.append(change)
    return done


def _to_replace(model: nn.Module, norm: str) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module]
    if norm == "batch":
        layers = {n: m for n, m in model.named_modules() if type(m) is nn.GroupNorm}
        if not layers:
            raise ValueError(
                f"{type(model).__name__} has no GroupNorm to replace by batch norm; undo() of what "
                "replace() returned brings back what was there"
            )
    else:
        layers = {**batch_norms(model)}
    if "" in layers:
        raise ValueError(
            f"the network is itself the {type(model).__name__}, which can only be replaced inside "
            "another module; put it into an nn.Sequential"
        )
    return layers


def _observe(
    model: nn.Module,
    layers: dict[str, nn.Module],
    example: tuple[Any, ...],
    named: dict[str, Any],
) -> dict[nn.Module, tuple[int, nn.Module | None]]:
    """Return the dimensions of each layer's input, and what it does after normalising."""
    seen: dict[nn.Module, tuple[int, nn.Module | None]] = {}

    def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        then = tail(layer, x, y) if isinstance(layer, _BatchNorm) else nn.Identity()
        if len(args) + len(kwargs) > 1:
            then = None
        if layer not in seen or then is None:
            seen[layer] = (x.dim(), then)

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        model.eval()
        for layer in layers.values():
            stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        with torch.no_grad():
            model(*example, **named)
    return seen


def _make(
    norm: str,
    layer: nn.Module,
    name: str,
    seen: dict[nn.Module, tuple[int, nn.Module | None]],
) -> nn.Module:
    """Make what comes in the place of a layer."""
    if layer not in seen:
        raise ValueError(
            f"{name} does not run on the example, so that it is not known what it does; pass an "
            "example on which it does"
        )
    dimensions, then = seen[layer]
    if then is None:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, which may do more than normalise (an activation, "
            "say), so that removing it could change more than the normalisation. Build the network "
            "with the other normalisation itself"
        )
    channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
    assert isinstance(channels, int)
    made = make_norm(norm, channels, dimensions - 2)
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    like = next((t for t in tensors if t.is_floating_point()), None)
    if like is not None:
        made.to(like.device, like.dtype)
    if hasattr(made, "eps"):
        made.eps = layer.eps
    for key in ("weight", "bias"):
        old, new = layer._parameters[key], made._parameters.get(key)
        if new is None or (old is not None and old.shape != new.shape):
            continue
        made._parameters[key] = None if old is None else nn.Parameter(
            old.detach().clone(), requires_grad=old.requires_grad
        )  # fmt: skip
    made.train(layer.training)
    return (
        made if isinstance(then, nn.Identity) else nn.Sequential(made, then.train(layer.training))
    )


def _bias(linear: nn.Module, layer: nn.Module) -> nn.Parameter:
    """Make a bias out of β."""
    channels, _ = channels_and_rank(linear)
    weight, beta = linear.weight, layer._parameters["bias"]
    assert isinstance(weight, Tensor)
    bias = weight.new_zeros(channels)
    if beta is not None:
        bias.copy_(beta.detach())
    return nn.Parameter(bias, requires_grad=weight.requires_grad)
