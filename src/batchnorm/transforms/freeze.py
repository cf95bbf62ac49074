"""Hold the statistics, or γ and β, of batch norms while the rest of a network learns."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.statistics import Frozen
from batchnorm.transforms.layers import batch_norms, matching, require_finite

__all__ = ["freeze", "frozen", "is_freezing", "statistics_frozen", "unfreeze"]


def freeze(
    model: nn.Module, *patterns: str, statistics: bool = True, affine: bool = True
) -> list[str]:
    r"""Freeze batch norms, so that ``train()`` does not undo it.

    .. math:: y = \gamma\,\frac{x - \bar\mu}{\sqrt{\bar\sigma^2 + \epsilon}} + \beta
        \qquad \text{in training too}

    With frozen statistics a layer normalises by its running statistics in training and does not
    change them; with frozen γ and β these take no gradient. Any kind of batch norm can be frozen:
    its class stays, and so does what its state dict holds. A layer with frozen statistics sets
    itself to evaluation whenever it is called.

    Args:
        model: The network, changed in place. A batch norm alone is allowed.
        *patterns: Names of layers, in which ``*`` stands for any text: ``"encoder.*"``. None: all.
        statistics: Whether to freeze the running statistics.
        affine: Whether to freeze γ and β. An optimiser that has them must not decay them either:
            it skips what has no gradient, unless one is left from before.

    Returns:
        The names of the layers that match.

    Raises:
        ValueError: A pattern matches no batch norm, or a layer has no running statistics to
            freeze, or such as are not finite. Nothing is changed then.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> freeze(model, "1", affine=False)
        ['1']
        >>> frozen(model.train())
        {'1': ('statistics',)}

    References:
        The frozen batch norm of He et al. 2017, *Mask R-CNN*, arXiv 1703.06870, and most
        detectors after it.
    """
    layers = matching(model, patterns)
    for name, layer in layers.items():
        if statistics and layer.running_mean is None:
            raise ValueError(
                f"{name or 'the layer'} has no running statistics to freeze "
                "(track_running_stats=False); leave it out, or freeze with statistics=False"
            )
    if statistics:
        require_finite(layers)
    for layer in layers.values():
        if statistics and not statistics_frozen(layer):
            layer.register_forward_pre_hook(_evaluate)
        if affine:
            _set_requires_grad(layer, False)
    return list(layers)


def unfreeze(
    model: nn.Module, *patterns: str, statistics: bool = True, affine: bool = True
) -> list[str]:
    """Undo :func:`freeze`, and ``statistics=Frozen()`` of a layer of ours.

    Layers are put into the mode of the network, as :func:`freeze` leaves them in evaluation.

    Args:
        model: The network, changed in place.
        *patterns: As in :func:`freeze`.
        statistics: Whether the running statistics follow the batches again.
        affine: Whether γ and β learn again.

    Returns:
        The names of the layers that match.

    Raises:
        ValueError: A pattern matches no batch norm.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        >>> _ = freeze(model)
        >>> unfreeze(model, statistics=False), frozen(model)
        (['1'], {'1': ('statistics',)})
    """
    layers = matching(model, patterns)
    for layer in layers.values():
        if statistics and statistics_frozen(layer):
            for key, hook in list(layer._forward_pre_hooks.items()):
                if hook is _evaluate:
                    del layer._forward_pre_hooks[key]
            if isinstance(getattr(layer, "statistics", None), Frozen):
                layer.statistics = None  # type: ignore[assignment]
            layer.train(model.training)
        if affine:
            _set_requires_grad(layer, True)
    return list(layers)


def frozen(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Say what is frozen: ``"statistics"``, ``"affine"`` or both, by the name of the layer.

    Layers of which nothing is frozen are not listed.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        >>> _ = freeze(model, "1")
        >>> frozen(model)
        {'1': ('statistics', 'affine')}
    """
    found = {}
    for name, layer in batch_norms(model).items():
        affine = [p for p in (layer.weight, layer.bias) if p is not None]
        held = ("statistics",) * statistics_frozen(layer)
        if affine and not any(p.requires_grad for p in affine):
            held += ("affine",)
        if held:
            found[name] = held
    return found


def statistics_frozen(layer: nn.Module) -> bool:
    """Tell whether ``train()`` leaves the running statistics of this layer as they are."""
    return _evaluate in layer._forward_pre_hooks.values() or isinstance(
        getattr(layer, "statistics", None), Frozen
    )


# A hook, as it goes along when a model is copied, pickled or moved. It is a function of the
# module, so that pickle finds it.
def _evaluate(layer: nn.Module, inputs: Any) -> None:
    layer.training = False


def is_freezing(hook: object) -> bool:
    """Tell whether a forward pre-hook is the one by which :func:`freeze` holds statistics."""
    return hook is _evaluate


def _set_requires_grad(layer: _BatchNorm, value: bool) -> None:
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            parameter.requires_grad_(value)
