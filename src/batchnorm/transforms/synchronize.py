"""Let batch norms take their statistics over all processes, and back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn import batchnorm as ours
from batchnorm.nn.statistics import Sync
from batchnorm.transforms.convert import BEYOND, convert, narrow_running_statistics, revert
from batchnorm.transforms.layers import batch_norms

__all__ = ["Synchronization", "desynchronize", "synchronize"]

# On a layer that was torch's own, so that it can be that again.
_MARK = "_was_torchs"


@dataclass(frozen=True)
class Synchronization:
    """What :func:`synchronize` or :func:`desynchronize` did."""

    changed: list[str]
    """The layers that were changed."""
    left: dict[str, str]
    """Why a layer stays as it was, by its name."""


def synchronize(model: nn.Module, process_group: ProcessGroup | None = None) -> Synchronization:
    r"""Give every batch norm :class:`Sync` statistics: those of all processes' batches.

    .. math:: \mu = \frac1n \sum_k n_k\,\mu_k, \qquad
        \sigma^2 = \frac1n \sum_k n_k \left(\sigma_k^2 + (\mu_k - \mu)^2\right)

    :class:`torch.nn.SyncBatchNorm` on CPU too, for uneven and empty batches. The layers stay the
    objects that they are, with their parameters, hooks and names in the state dict: before
    or after an optimiser is made and the network wrapped. Torch's own turn into ours, as by
    :func:`convert`; a class derived from torch's stays and computes through ours, if its
    ``forward`` only adds to torch's.

    Left are layers with other statistics of their own (:class:`Ghost`, :class:`Frozen`...),
    and classes whose ``forward`` does not go through torch's.

    Args:
        model: The network, changed in place. A batch norm alone is allowed.
        process_group: The processes. Default: the group that a SyncBatchNorm has, else all.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: There is no batch norm, or one has not seen its first input.
        TypeError: ``process_group`` is not one, or this process is not in it.

    Example:
        >>> from torch import nn
        >>> from batchnorm import BatchNorm2d, Ghost
        >>> model = nn.Sequential(nn.BatchNorm2d(8), BatchNorm2d(8, statistics=Ghost(4)))
        >>> synchronize(model)
        Synchronization(changed=['0'], left={'1': 'has statistics=Ghost(size=4)'})
        >>> desynchronize(model)
        Synchronization(changed=['0'], left={})

    References:
        Peng et al. 2017, *MegDet*, arXiv 1711.07240, section 3.2.
    """
    statistics = Sync(process_group)
    layers = batch_norms(model)
    left = {name: reason for name, layer in layers.items() if (reason := _left_alone(layer))}
    changed = {name: layer for name, layer in layers.items() if name not in left}
    for layer in changed.values():
        group = layer.__dict__.get("process_group")
        if type(layer) is nn.SyncBatchNorm:
            _make_ours(layer)
        elif not isinstance(layer, ours._BatchNorm):
            if isinstance(convert(layer), ours._BatchNorm):
                setattr(layer, _MARK, True)
            else:
                layer.__class__ = _through_ours(type(layer))
                _begin(layer)
        own = statistics if process_group is not None or group is None else Sync(group)
        layer.statistics = own  # type: ignore[assignment]
    return Synchronization(list(changed), left)


def desynchronize(model: nn.Module) -> Synchronization:
    """Take statistics of the process's own batch again: the opposite of :func:`synchronize`.

    The layers become what they were. A :class:`torch.nn.SyncBatchNorm`, which need not have been
    synchronised by us, becomes a :class:`batchnorm.nn.BatchNorm`.

    Args:
        model: The network, changed in place. A batch norm alone is allowed.

    Returns:
        What was changed, and what was left and why.

    Raises:
        ValueError: There is no batch norm, or one has not seen its first input.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm2d(8))
        >>> _ = synchronize(model), desynchronize(model)
        >>> type(model[0]) is nn.BatchNorm2d
        True
    """
    changed, left = [], {}
    for name, layer in batch_norms(model).items():
        if type(layer) is nn.SyncBatchNorm:
            _make_ours(layer)
        elif isinstance(layer, nn.SyncBatchNorm):
            left[name] = _OF_TORCHS_SYNC.format(type(layer).__name__)
            continue
        elif isinstance(getattr(layer, "statistics", None), Sync):
            layer.statistics = None  # type: ignore[assignment]
            origin = type(layer).__dict__.get("_origin")
            if origin is not None:
                layer.__class__ = origin
                for option in BEYOND:
                    delattr(layer, option)
                narrow_running_statistics(layer)
            # What it got since, torch's has not.
            elif layer.__dict__.pop(_MARK, False) and not layer.activation and not layer.guard:
                revert(layer)
        else:
            continue
        changed.append(name)
    return Synchronization(changed, left)


_OF_TORCHS_SYNC = (
    "is a {}, a subclass of torch.nn.SyncBatchNorm, which communicates in its own way; "
    "derive it from torch.nn.BatchNorm2d or its like"
)


def _left_alone(layer: _BatchNorm) -> str:
    """Say why a layer cannot be synchronised, or nothing."""
    cls = type(layer)
    is_ours = isinstance(layer, ours._BatchNorm)
    statistics = layer.statistics if is_ours else None
    if statistics is not None and not isinstance(statistics, Sync):
        return f"has statistics={statistics!r}"
    if isinstance(layer, nn.SyncBatchNorm) and cls is not nn.SyncBatchNorm:
        return _OF_TORCHS_SYNC.format(cls.__name__)
    if not _adds_to_forward(layer):
        return (
            f"is a {cls.__name__}, whose forward may not go through torch's; let it call "
            "super().forward, or give it statistics of its own"
        )
    taken = [] if is_ours else [option for option in BEYOND if hasattr(layer, option)]
    if taken:
        return f"is a {cls.__name__}, which has a meaning of its own for {', '.join(taken)}"
    return ""


def _adds_to_forward(layer: _BatchNorm) -> bool:
    """Tell whether every forward in front of torch's or ours calls the next, and no other."""
    if "forward" in vars(layer):
        return False
    for cls in type(layer).__mro__:
        if cls.__module__ in (nn.modules.batchnorm.__name__, ours.__name__):
            return True
        if "forward" in vars(cls):
            code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
            names = () if code is None else code.co_names
            if not {"super", "forward"} <= {*names} or "batch_norm" in names:
                return False
    return False


def _make_ours(layer: nn.Module) -> None:
    layer.__class__ = ours.BatchNorm
    del layer.process_group
    _begin(layer)


def _begin(layer: nn.Module) -> None:
    for option in BEYOND:
        setattr(layer, option, None)
    assert isinstance(layer, ours._BatchNorm)
    layer._widen_running_statistics()


_THROUGH_OURS: dict[type, type] = {}


def _through_ours(cls: type) -> type:
    """Return a class whose ``super().forward`` is ours where that of ``cls`` is torch's."""
    if cls in _THROUGH_OURS:
        return _THROUGH_OURS[cls]
    pairs = (
        (nn.BatchNorm1d, ours.BatchNorm1d),
        (nn.BatchNorm2d, ours.BatchNorm2d),
        (nn.BatchNorm3d, ours.BatchNorm3d),
    )
    base = next((our for their, our in pairs if issubclass(cls, their)), ours.BatchNorm)
    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {
        "_origin": cls,
        "__reduce_ex__": lambda self, _: (_blank, (cls,), self.__getstate__()),
    }
    made = _THROUGH_OURS[cls] = type(cls.__name__, (cls, base), members)
    return made


def _blank(cls: type) -> Any:
    # By the class that pickle can find.
    made = _through_ours(cls)
    return object.__new__(made)
