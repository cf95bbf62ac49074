"""The layer, for inputs of one, two and three spatial axes."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm.nn.guard import Guard
from batchnorm.nn.statistics import Running, Statistics
from batchnorm.validation import activation_code, check_eps


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the layers of all ranks share: everything but the ranks.

    Running statistics are float32 whatever the parameters are: at momentum 0.001 a bfloat16
    average stops moving a third of the way. ``half()``, ``bfloat16()``, ``to(dtype)`` and
    ``load_state_dict(assign=True)`` leave them so; only ``double()`` widens them, as a model in
    float64 is one whose every digit is meant.
    """

    _ranks: ClassVar[tuple[int, ...]]
    _shapes: ClassVar[str]

    def __init__(
        self,
        num_features: int,
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
        if num_features < 0:
            raise ValueError(f"num_features must not be negative, got {num_features}")
        if not math.isfinite(eps):
            check_eps(eps)
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(
                f"momentum must be in [0, 1] or None for a cumulative average, got {momentum}; "
                "it is the weight of the new batch, 1 minus what Keras and Flax call momentum"
            )
        activation_code(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation
        self.statistics = statistics
        self.guard = guard
        self._widen_running_statistics()

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Return act(bn(x) + residual), act the layer's own unless one is given."""
        self._check_input_dim(x)
        if not self.eps > 0:  # named here and not before, as torch does
            raise ValueError(
                f"eps must be positive, got {self.eps}; the usual is 1e-5, and for an eps of 0 "
                "there is batchnorm.functional.batch_norm"
            )
        if activation is None:
            activation = self.activation
        # Looked up here, and once: an attribute of a module costs as much as a small operation.
        buffers, weight, bias = self._buffers, self.weight, self.bias
        running = Running(
            buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        )
        if not self.training and running.mean is not None and running.var is not None:
            return functional.normalize(
                *(x, running.mean, running.var, weight, bias, self.eps),
                residual=residual,
                activation=activation,
            )
        if self.statistics is None or not self.training:
            y, moments = functional.batch_norm(
                *(x, weight, bias, self.eps),
                residual=residual,
                activation=activation,
                mask=mask,
            )
        else:
            y, moments = self.statistics.batch_norm(
                *(x, weight, bias, self.eps, running),
                residual=residual,
                activation=activation,
                mask=mask,
            )
        if self.training and self.track_running_stats and not _is_recomputation():
            self._track(moments, running)
        return y

    def _track(self, moments: functional.Moments, running: Running) -> None:
        mean, var, batches = running
        if mean is None or var is None:
            return
        checked = moments if self.guard is None else self.guard.check(moments, running, self)
        if checked is not None:
            functional.update_running(mean, var, checked, self.momentum, batches)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._ranks:
            raise ValueError(
                f"expected {' or '.join(f'{rank}D' for rank in self._ranks)} input, "
                f"{self._shapes}, got {input.dim()}D of shape {tuple(input.shape)}; "
                "use the layer of that rank, or reshape"
            )

    def _widen_running_statistics(self) -> None:
        for name in ("running_mean", "running_var"):
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype.itemsize < 4:
                self._buffers[name] = buffer.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_BatchNorm":
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, wide in zip(("running_mean", "running_var"), before, strict=True):
            narrow = self._buffers[name]
            if wide is not None and narrow is not None and narrow.dtype.itemsize < 4:
                self._buffers[name] = wide.to(narrow.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._widen_running_statistics()

    def extra_repr(self) -> str:
        """Describe the layer as torch does, and what it has beyond."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        for name in ("activation", "statistics", "guard"):
            value = getattr(self, name)
            if value is not None:
                text += f", {name}={value!r}"
        return text


def _is_recomputation() -> bool:
    """Tell whether this forward runs inside a backward, as activation checkpointing does.

    It was counted when it ran first. A compiler recomputes by itself, without calling again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalization of features (N, C) or sequences (N, C, L).

    .. math::

        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    In training μ and σ² are the moments of the batch, per channel over all other axes, and the
    running statistics follow them: running ← (1 − momentum)·running + momentum·batch, of the
    variance the unbiased one. In evaluation the running statistics are μ and σ². It is
    :class:`torch.nn.BatchNorm1d`, a subclass and interchangeable by state dict, and beyond it

    - adds a residual and activates in the same pass: ``layer(x, residual)``, or for one call
      otherwise than it is set to, ``layer(x, activation="relu")``;
    - counts only where ``mask`` (booleans (N, \*)) is true: ``layer(x, mask=mask)``;
    - keeps its running statistics in float32 whatever the type of its parameters;
    - updates them once a step, also where activation checkpointing runs forward twice;
    - leaves them alone when a batch is empty.

    Args:
        num_features: The number of channels C, axis 1.
        eps: ε, positive and finite.
        momentum: The weight of the new batch in the running statistics, in [0, 1]; None for the
            cumulative average of all batches.
        affine: Whether to learn γ and β; without, they are 1 and 0.
        track_running_stats: Whether to keep running statistics; without, evaluation too uses the
            moments of its batch.
        bias: Whether to learn β.
        activation: One of :data:`batchnorm.functional.ACTIVATIONS`, fused. Default: none.
        statistics: What training normalises by: :class:`Ghost`, :class:`Renorm`, :class:`Lp`,
            :class:`Sync` or :class:`Frozen`. Default: the batch.
        guard: What to refuse or to warn of, a :class:`Guard`. Default: nothing.
        device: Where parameters and buffers are.
        dtype: The type of the parameters.

    Raises:
        ValueError: An argument is out of range, or in a call the shape is wrong or training
            has only one value for each channel.
        TypeError: In a call, a type is wrong.

    References:
        [P1] Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1; running averages in place of
        Algorithm 2.

    Example:
        >>> import torch
        >>> layer = BatchNorm1d(3)
        >>> y = layer(torch.randn(8, 3))
        >>> y.shape, layer.num_batches_tracked.item()
        (torch.Size([8, 3]), 1)
        >>> padded = torch.randn(2, 3, 5)
        >>> mask = torch.arange(5) < torch.tensor([[5], [2]])
        >>> layer(padded, mask=mask).shape
        torch.Size([2, 3, 5])
    """

    _ranks = (2, 3)
    _shapes = "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalization of images (N, C, H, W).

    .. math::

        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    In training μ and σ² are the moments of the batch, per channel over all other axes, and the
    running statistics follow them: running ← (1 − momentum)·running + momentum·batch, of the
    variance the unbiased one. In evaluation the running statistics are μ and σ². It is
    :class:`torch.nn.BatchNorm2d`, a subclass and interchangeable by state dict, and beyond it

    - adds a residual and activates in the same pass: ``layer(x, residual)``, or for one call
      otherwise than it is set to, ``layer(x, activation="relu")``;
    - counts only where ``mask`` (booleans (N, \*)) is true: ``layer(x, mask=mask)``;
    - keeps its running statistics in float32 whatever the type of its parameters;
    - updates them once a step, also where activation checkpointing runs forward twice;
    - leaves them alone when a batch is empty.

    Args:
        num_features: The number of channels C, axis 1.
        eps: ε, positive and finite.
        momentum: The weight of the new batch in the running statistics, in [0, 1]; None for the
            cumulative average of all batches.
        affine: Whether to learn γ and β; without, they are 1 and 0.
        track_running_stats: Whether to keep running statistics; without, evaluation too uses the
            moments of its batch.
        bias: Whether to learn β.
        activation: One of :data:`batchnorm.functional.ACTIVATIONS`, fused. Default: none.
        statistics: What training normalises by: :class:`Ghost`, :class:`Renorm`, :class:`Lp`,
            :class:`Sync` or :class:`Frozen`. Default: the batch.
        guard: What to refuse or to warn of, a :class:`Guard`. Default: nothing.
        device: Where parameters and buffers are.
        dtype: The type of the parameters.

    Raises:
        ValueError: An argument is out of range, or in a call the shape is wrong or training
            has only one value for each channel.
        TypeError: In a call, a type is wrong.

    References:
        [P1] Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1; running averages in place of
        Algorithm 2.

    Example:
        >>> import torch
        >>> layer = BatchNorm2d(3, activation="relu")
        >>> x = torch.randn(8, 3, 4, 4)
        >>> layer(x, residual=x).min().item() >= 0
        True
    """

    _ranks = (4,)
    _shapes = "(N, C, H, W)"


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    r"""Batch normalization of volumes or video (N, C, D, H, W).

    .. math::

        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    In training μ and σ² are the moments of the batch, per channel over all other axes, and the
    running statistics follow them: running ← (1 − momentum)·running + momentum·batch, of the
    variance the unbiased one. In evaluation the running statistics are μ and σ². It is
    :class:`torch.nn.BatchNorm3d`, a subclass and interchangeable by state dict, and beyond it

    - adds a residual and activates in the same pass: ``layer(x, residual)``, or for one call
      otherwise than it is set to, ``layer(x, activation="relu")``;
    - counts only where ``mask`` (booleans (N, \*)) is true: ``layer(x, mask=mask)``;
    - keeps its running statistics in float32 whatever the type of its parameters;
    - updates them once a step, also where activation checkpointing runs forward twice;
    - leaves them alone when a batch is empty.

    Args:
        num_features: The number of channels C, axis 1.
        eps: ε, positive and finite.
        momentum: The weight of the new batch in the running statistics, in [0, 1]; None for the
            cumulative average of all batches.
        affine: Whether to learn γ and β; without, they are 1 and 0.
        track_running_stats: Whether to keep running statistics; without, evaluation too uses the
            moments of its batch.
        bias: Whether to learn β.
        activation: One of :data:`batchnorm.functional.ACTIVATIONS`, fused. Default: none.
        statistics: What training normalises by: :class:`Ghost`, :class:`Renorm`, :class:`Lp`,
            :class:`Sync` or :class:`Frozen`. Default: the batch.
        guard: What to refuse or to warn of, a :class:`Guard`. Default: nothing.
        device: Where parameters and buffers are.
        dtype: The type of the parameters.

    Raises:
        ValueError: An argument is out of range, or in a call the shape is wrong or training
            has only one value for each channel.
        TypeError: In a call, a type is wrong.

    References:
        [P1] Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1; running averages in place of
        Algorithm 2.

    Example:
        >>> import torch
        >>> BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 3, 4, 4, 4])
    """

    _ranks = (5,)
    _shapes = "(N, C, D, H, W)"


class BatchNorm(_BatchNorm):
    r"""Batch normalization of inputs of any rank, (N, C, \*): :class:`BatchNorm1d` and its like.

    It is what becomes of a :class:`torch.nn.SyncBatchNorm`, which has no rank either.

    Example:
        >>> import torch
        >>> layer = BatchNorm(3)
        >>> layer(torch.randn(8, 3)).shape, layer(torch.randn(8, 3, 4, 4)).shape
        (torch.Size([8, 3]), torch.Size([8, 3, 4, 4]))
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Leave it to the function."""
