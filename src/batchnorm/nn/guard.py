"""What a layer refuses or warns of, on request."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.functional import Moments
from batchnorm.nn.statistics import Running

__all__ = ["Guard"]


@dataclass(frozen=True)
class Guard:
    """Keep running statistics from going wrong silently.

    Args:
        non_finite: Refuse to update running statistics by moments that are not finite, in which
            one bad batch would leave a NaN for ever, and warn. It waits for the device.
        no_grad: Warn of training under ``torch.no_grad()``, where running statistics change but
            nothing learns: mostly a forgotten ``eval()``.

    Warns:
        RuntimeWarning: In a call, of the above. Where values cannot be looked at (compiled, in
            torch.func) it refuses without a warning, and counts the batch.

    Example:
        >>> import torch, warnings
        >>> from batchnorm import BatchNorm1d
        >>> layer = BatchNorm1d(1, guard=Guard())
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = layer(torch.tensor([[1.0], [float("nan")]]))
        >>> len(caught), layer.running_mean.item()
        (1, 0.0)
    """

    non_finite: bool = True
    no_grad: bool = True

    def check(self, moments: Moments, running: Running, layer: object) -> Moments | None:
        """Return the moments that may be tracked, or None, having warned."""
        if self.no_grad and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            _warn(
                f"{layer} updates its running statistics under torch.no_grad(), where nothing "
                "learns; call eval() first, or take the guard off to recalibrate"
            )
        if not self.non_finite or running.mean is None or running.var is None:
            return moments
        n = moments.n
        # What will be kept is float32: a variance that only float64 holds is not finite there.
        kept: Tensor = torch.stack([moments.mean, moments.var * (n / (n - 1))]).detach()
        finite = kept.to(running.mean.dtype).isfinite().all()
        if _is_blind(finite):  # no branch, then: what stands is averaged into itself
            mean = torch.where(finite, kept[0], running.mean)
            var = torch.where(finite, kept[1], running.var) * ((n - 1) / n)
            return Moments(mean, var, n)
        if not finite:
            _warn(
                f"{layer} refused an update of its running statistics: the moments of the batch "
                "are not finite; look for overflow upstream, or for NaN in the data"
            )
            return None
        return moments


def _is_blind(value: Tensor) -> bool:
    """Tell whether the value cannot be looked at: compiled, in torch.func, or on meta."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or value.is_meta
    )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
