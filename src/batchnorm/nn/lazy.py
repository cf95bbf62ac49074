"""Layers that learn their number of channels from the first input."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from batchnorm.nn.guard import Guard
from batchnorm.nn.statistics import Statistics

__all__ = ["LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]


class _LazyBatchNorm(_LazyNormBase, _BatchNorm):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        activation: str | None = None,
        statistics: Statistics | None = None,
        guard: Guard | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.statistics = statistics
        self.guard = guard

    def initialize_parameters(self, x: Tensor) -> None:
        self._check_input_dim(x)
        super().initialize_parameters(x)
        self._widen_running_statistics()


class LazyBatchNorm1d(_LazyBatchNorm, torch.nn.LazyBatchNorm1d):
    """A :class:`BatchNorm1d` whose number of channels is that of its first input.

    The arguments are those of :class:`BatchNorm1d` after ``num_features``.

    Example:
        >>> import torch
        >>> layer = LazyBatchNorm1d(activation="relu")
        >>> _ = layer(torch.randn(8, 3))
        >>> type(layer).__name__, layer.num_features
        ('BatchNorm1d', 3)
    """

    cls_to_become = BatchNorm1d  # type: ignore[assignment]
    _ranks = BatchNorm1d._ranks
    _shapes = BatchNorm1d._shapes


class LazyBatchNorm2d(_LazyBatchNorm, torch.nn.LazyBatchNorm2d):
    """A :class:`BatchNorm2d` whose number of channels is that of its first input.

    The arguments are those of :class:`BatchNorm2d` after ``num_features``.
    """

    cls_to_become = BatchNorm2d  # type: ignore[assignment]
    _ranks = BatchNorm2d._ranks
    _shapes = BatchNorm2d._shapes


class LazyBatchNorm3d(_LazyBatchNorm, torch.nn.LazyBatchNorm3d):
    """A :class:`BatchNorm3d` whose number of channels is that of its first input.

    The arguments are those of :class:`BatchNorm3d` after ``num_features``.
    """

    cls_to_become = BatchNorm3d  # type: ignore[assignment]
    _ranks = BatchNorm3d._ranks
    _shapes = BatchNorm3d._shapes
