"""Start residual blocks as the identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from batchnorm.transforms.dataflow import preserved
from batchnorm.transforms.layers import batch_norms

__all__ = ["ZeroedGamma", "zero_gamma"]

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_LINEAR = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum,
}  # fmt: skip


@dataclass(frozen=True)
class ZeroedGamma:
    """What :func:`zero_gamma` did."""

    zeroed: list[str]
    """The batch norms whose γ is 0 now, the last of one residual block each."""
    left: dict[str, str]
    """Why a residual block, by its last batch norms, stayed as it was."""


class _History(NamedTuple):
    passed: frozenset[_BatchNorm] = frozenset()
    """The batch norms that a value depends on."""
    last: _BatchNorm | None = None
    """The one since which no linear operation and no sum came."""


class _Additions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.histories: dict[int, _History] = {}
        self.alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self.found: list[tuple[_History, _History]] = []
        self.inside = 0

    def of(self, value: object) -> _History:
        return self.histories.get(id(value), _History())

    def give(self, tensor: Tensor, history: _History) -> None:
        self.histories[id(tensor)] = history
        self.alive.append(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inputs = [self.of(leaf) for leaf in tree_leaves((args, kwargs))]  # before it changes any
        result = func(*args, **(kwargs or {}))
        if self.inside or not any(history.passed for history in inputs):
            return result
        lasts = {history.last for history in inputs} - {None}
        last = lasts.pop() if len(lasts) == 1 and func not in _LINEAR else None
        if func in _ADDITIONS and all(isinstance(a, Tensor) for a in args[:2]):
            if args[0].shape == args[1].shape:
                self.found.append((inputs[0], inputs[1]))
            last = None
        history = _History(frozenset().union(*(h.passed for h in inputs)), last)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.give(leaf, history)
        return result


def zero_gamma(model: nn.Module, *example: Any, **named: Any) -> ZeroedGamma:
    r"""Set γ = 0 in the last batch norm of each residual block.

    .. math:: y = x + \gamma\,\hat z + \beta = x \qquad \text{at first, with } \beta = 0

    The network starts as a shallow one, in which the signal neither grows nor fades. To be done
    before training; β is as it is, 0 in a new layer.

    Blocks are found by running the network: where two values of one shape are added, the branch
    with more batch norms of its own is the residual one, and its last is zeroed if after it come
    neither a linear operation nor another sum.

    Args:
        model: The network, changed in place.
        *example: What to call the network with.
        **named: What to call it with by name.

    Returns:
        Which layers have γ = 0 now, and which blocks were left, with the reason.

    Raises:
        ValueError: The network has no batch norm, or nowhere adds what went through one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        ...
        ...     def forward(self, x):
        ...         return x + self.bn(self.conv(x))
        >>> zero_gamma(nn.Sequential(Block(), Block()), torch.randn(2, 4, 8, 8)).zeroed
        ['0.bn', '1.bn']

    References:
        Goyal et al. 2017, arXiv 1706.02677, section 5.1.
    """
    names = {layer: name for name, layer in batch_norms(model).items()}
    additions = _Additions()

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        additions.inside += 1

    def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        assert isinstance(layer, _BatchNorm)
        additions.inside -= 1
        x, *residual = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        history = _History(additions.of(x).passed | {layer}, layer)
        if residual and residual[0].shape == y.shape:
            shortcut = additions.of(residual[0])
            additions.found.append((history, shortcut))
            history = _History(history.passed | shortcut.passed)
        additions.give(y, history)

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        model.eval()
        for layer in names:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        with torch.no_grad(), additions:
            model(*example, **named)
    chosen: dict[_BatchNorm, None] = {}
    left = {}
    for a, b in additions.found:
        own = sorted((a, b), key=lambda h: len(h.passed - (a.passed & b.passed)))
        shorter, longer = (len(h.passed - (a.passed & b.passed)) for h in own)
        if not longer:
            continue  # a position, a bias
        last = own[1].last
        where = ", ".join(sorted(names[m] for m in own[1].passed - own[0].passed))
        if shorter == longer:
            left[where] = "no branch is the residual one: both have as many batch norms"
        elif last is None:
            left[where] = "the block does not end in a batch norm"
        elif last._parameters["weight"] is None:
            left[where] = f"{names[last]} has no γ"
        else:
            chosen[last] = None
    if not chosen and not left:
        raise ValueError(
            "the network adds nowhere what went through a batch norm: it has no residual blocks"
        )
    for layer in chosen:
        nn.init.zeros_(layer.weight)
    return ZeroedGamma([names[layer] for layer in chosen], left)
