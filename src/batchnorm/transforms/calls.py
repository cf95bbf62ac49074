"""Every call of a linear operation or a batch norm: whence its input, whither its output.

Found by running the network once on an example, as in :mod:`~batchnorm.transforms.dataflow`, but
complete: whatever takes a value is seen, so that "nothing else does" can be relied upon.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from batchnorm.transforms.dataflow import LINEAR_TYPES, preserved
from batchnorm.transforms.freeze import is_freezing

__all__ = [
    "Call",
    "Calls",
    "behind",
    "follow",
    "largest_difference",
    "reserved",
    "taker_name",
    "tolerance",
]

_OPERATIONS = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}

# What puts values elsewhere but leaves each of them as it is.
_MOVES = frozenset(
    getattr(place, name)
    for name in (
        "reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "ravel",
        "permute", "transpose", "swapaxes", "movedim", "moveaxis", "t",
        "squeeze", "unsqueeze", "contiguous", "clone",
    )
    for place in (torch, Tensor)
    if callable(getattr(place, name, None))
)  # fmt: skip
_MOVING_PROPERTIES = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT"))
_DROPOUTS = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout})

# Questions about a tensor that its values do not answer.
_ABOUT = frozenset({
    "dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "get_device", "__len__", "__hash__",
})  # fmt: skip

# What takes values out of tensors, for Python to decide upon.
_DECIDING = frozenset({
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "item", "tolist",
    "numpy", "equal", "allclose", "is_nonzero",
})  # fmt: skip


@dataclass(eq=False)
class Call:
    """One call of a linear operation or a batch norm."""

    module: nn.Module
    source: Call | None
    """Whose output the input is, moved at most."""
    channels: Tensor | None
    """The channel of the source that each value of the input belongs to, if it was moved."""
    input_shape: torch.Size
    output_shape: torch.Size = field(default_factory=torch.Size)
    takers: list[Call | str] = field(default_factory=list)
    """What took the output."""
    doubt: str = ""
    """Why the module may do more than its class says."""
    sample: Tensor | None = None
    """Some of the output."""

    @property
    def channel_axis(self) -> int:
        """The axis of the output that its channels are on."""
        if isinstance(self.module, _BatchNorm):
            return 1
        if isinstance(self.module, nn.Linear):
            return len(self.output_shape) - 1
        assert isinstance(self.module, nn.modules.conv._ConvNd)
        return len(self.output_shape) - len(self.module.kernel_size) - 1

    def source_channels(self, axis: int) -> Tensor | None:
        """Return the channel of the source for each index of an axis of the input.

        None where the index does not tell the channel: other axes decide, too.
        """
        source = self.source
        assert source is not None
        size = self.input_shape[axis]
        if self.channels is None:
            return torch.arange(size) if source.channel_axis == axis else None
        rows = self.channels.movedim(axis, -1).reshape(-1, size)
        return rows[0].clone() if bool((rows == rows[0]).all()) else None


@dataclass
class Calls:
    """What :func:`follow` saw."""

    of: dict[nn.Module, list[Call]]
    """The calls of each linear operation and batch norm that ran, in their order."""
    parameters_elsewhere: set[nn.Module]
    """Modules of which something else than their own call reads a parameter or a buffer."""
    output: list[Tensor]
    """The tensors in what the network returned."""


@dataclass
class _Value:
    call: Call
    channels: Tensor | None


class _Follower(TorchFunctionMode):
    def __init__(
        self,
        owners: dict[int, set[nn.Module]],
        names: dict[nn.Module, str],
        example: list[Tensor],
    ) -> None:
        super().__init__()
        self.owners = owners
        self.names = names
        self.of_example = WeakIdKeyDictionary(dict.fromkeys(example))
        self.values: dict[int, _Value] = {}
        self.alive: list[Tensor] = []  # an id is only unique while its tensor lives
        self.inside: list[tuple[Call, list[Any]]] = []  # tracked modules that run, their functions
        self.elsewhere: set[nn.Module] = set()

    def give(self, tensor: Tensor, call: Call, channels: Tensor | None) -> None:
        self.values[id(tensor)] = _Value(call, channels)
        self.alive.append(tensor)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in _ABOUT or (name == "__get__" and not isinstance(result, Tensor)):
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor in self.of_example for tensor in tensors):
            if name in _DECIDING:
                raise ValueError(self._decision())
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.of_example[leaf] = None
        running = self.inside[-1][0].module if self.inside else None
        for tensor in tensors:
            owners = self.owners.get(id(tensor), set())
            if running not in owners:
                self.elsewhere |= owners
        if self.inside:
            self.inside[-1][1].append((func, tensors, result))
            if isinstance(running, _BatchNorm) or func in _OPERATIONS or func is F.pad:
                return result
        for tensor in tensors:
            value = self.values.get(id(tensor))
            if value is None:
                continue
            if args and tensor is args[0] and self._moves(func, args, kwargs):
                if result is not tensor:
                    self.give(result, value.call, self._moved(func, args, kwargs, value))
            else:
                value.call.takers.append(name)
        return result

    def _decision(self) -> str:
        """Say that the network decides on values, and where."""
        frame = sys._getframe(2)
        while frame.f_back and frame.f_globals.get("__name__", "").startswith(("torch.", __name__)):
            frame = frame.f_back
        module = frame.f_locals.get("self")
        name = self.names.get(module, "") if isinstance(module, nn.Module) else ""
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        return (
            f"{name or 'the network'} decides on values of its input ({place}): what it does with "
            "others cannot be seen on an example. Change the parts without such decisions one by "
            "one, such as model.backbone on an example of its input"
        )

    def _moves(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if func in _DROPOUTS:
            return (args[2:3] or (kwargs.get("training", True),))[0] is False and not (
                args[3:4] or (kwargs.get("inplace", False),)
            )[0]
        return func in _MOVES or func in _MOVING_PROPERTIES

    def _moved(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: _Value
    ) -> Tensor:
        channels = value.channels
        if channels is None:
            shape = [1] * args[0].dim()
            shape[value.call.channel_axis] = -1
            channels = torch.arange(args[0].shape[value.call.channel_axis]).view(shape)
        # In the same layout, as not every one can be viewed alike.
        channels = torch.empty_like(args[0], dtype=torch.int64, device="cpu").copy_(channels)
        others = [torch.empty(a.shape) if isinstance(a, Tensor) else a for a in args[1:]]
        moved: Tensor = func(channels, *others, **kwargs)
        return moved


def follow(
    model: nn.Module,
    example: tuple[Any, ...],
    named: dict[str, Any],
    sample: Callable[[Tensor], Tensor | None],
    examine: Callable[[_BatchNorm, Tensor, Tensor], None],
) -> Calls:
    """Run ``model(*example, **named)`` in its mode and say what takes what. Nothing changes.

    Args:
        model: The network.
        example: Positional arguments.
        named: Named arguments.
        sample: What to keep of the output of each call.
        examine: Called with each batch norm, its input and its output.

    Raises:
        ValueError: The network decides on values, so that one run does not show what it does.
    """
    tracked = {
        module for module in model.modules() if isinstance(module, (*LINEAR_TYPES, _BatchNorm))
    }
    owners: dict[int, set[nn.Module]] = {}
    for module in tracked:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            owners.setdefault(id(tensor), set()).add(module)
    names = {module: name for name, module in model.named_modules()}
    inputs = [leaf for leaf in tree_leaves((example, named)) if isinstance(leaf, Tensor)]
    follower = _Follower(owners, names, inputs)
    calls: dict[nn.Module, list[Call]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        value = follower.values.get(id(x))
        call = Call(module, None, None, x.shape)
        if len(args) + len(kwargs) > 1:
            call.doubt = "is called with more than an input"
        for tensor in tree_leaves((args, kwargs)):
            taken = follower.values.get(id(tensor))
            if taken is not None:
                taken.call.takers.append(call)
        if value is not None:
            call.source, call.channels = value.call, value.channels
        follower.inside.append((call, []))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, functions = follower.inside.pop()
        calls.setdefault(module, []).append(call)
        call.output_shape = output.shape
        x = args[0] if args else next(iter(kwargs.values()))
        with torch._C.DisableTorchFunction():
            call.sample = sample(output)
            if isinstance(module, _BatchNorm):
                examine(module, x, output)
            else:
                call.doubt = call.doubt or _more_than_linear(module, functions, output)
        if output is not x:
            follower.give(output, call, None)

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        for module in tracked:
            # First in, last out, so that hooks of others count as taking what they take.
            handles = (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
        with torch.no_grad(), follower:
            output = [t for t in tree_leaves(model(*example, **named)) if isinstance(t, Tensor)]
    for tensor in output:
        if (value := follower.values.get(id(tensor))) is not None:
            value.call.takers.append("the output of the network")
    _find_kept(follower, output)
    return Calls(calls, follower.elsewhere, output)


def _more_than_linear(module: nn.Module, functions: list[Any], output: Tensor) -> str:
    """Say why a call was not just the operation of its class on the weight, or nothing."""
    *before, (func, tensors, result) = functions or [(None, [], None)]
    if (
        any(f is not F.pad for f, _, _ in before)
        or not isinstance(module, _OPERATIONS.get(func, ()))
        or not any(t is module.weight for t in tensors)
        or result is not output
    ):
        return "computes its weight, or does more than its operation"
    return ""


def _find_kept(follower: _Follower, output: list[Tensor]) -> None:
    """Note the values that something still holds, in an attribute say."""
    returned = {id(t) for t in output}
    values = follower.values
    unheld = _references([torch.empty(0)])[1]
    while follower.alive:
        tensor, references = _references(follower.alive)
        if references > unheld and tensor not in returned:
            values[tensor].call.takers.append("something that keeps it")


def _references(tensors: list[Tensor]) -> tuple[int, int]:
    """Take the last of the tensors; return its id and how many references to it there are."""
    tensor = tensors.pop()
    return id(tensor), sys.getrefcount(tensor)


def reserved(module: nn.Module, calls: Calls) -> str:
    """Say why the parameters of a module must stay as they are, or nothing."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if any(not is_freezing(hook) for hook in hooks):
        return "has a forward hook (weight_norm and pruning are such)"
    if module in calls.parameters_elsewhere:
        return "has a parameter or buffer that something else uses as well"
    return next((call.doubt for call in calls.of[module] if call.doubt), "")


def behind(layer: _BatchNorm, names: dict[nn.Module, str], calls: Calls) -> list[nn.Module] | str:
    """Return the linear operations whose output the layer takes, or why it cannot fold."""
    into: dict[nn.Module, None] = {}
    for call in calls.of[layer]:
        source = call.source
        if source is None or isinstance(source.module, _BatchNorm):
            return "its input is not the output of a linear operation"
        channels = call.source_channels(1)
        if channels is None or not torch.equal(channels, torch.arange(layer.num_features)):
            return f"axis 1, which it normalises, is not the output axis of {names[source.module]}"
        into[source.module] = None
    for module in into:
        if reason := reserved(module, calls):
            return f"{names[module]} {reason}"
        for call in calls.of[module]:
            for taker in call.takers:
                if not (isinstance(taker, Call) and taker.module is layer):
                    return (
                        f"the output of {names[module]} goes to {taker_name(taker, names)} as well"
                    )
    return list(into)


def taker_name(taker: Call | str, names: dict[nn.Module, str]) -> str:
    """Return what to call a taker in a sentence."""
    return taker if isinstance(taker, str) else names[taker.module]


def tolerance(values: Any) -> float:
    """Return how much may change through rounding, over the largest value."""
    return max(1e-4, 16 * torch.finfo(values.dtype).eps)


def largest_difference(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest absolute value before."""
    largest, scale = 0.0, 0.0
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point() or not old.numel():
            continue
        if old.shape != new.shape:
            return float("inf"), scale
        difference = float((old.double() - new.double()).abs().max())
        largest = max(largest, difference if difference == difference else float("inf"))
        scale = max(scale, float(old.double().abs().max()))
    return largest, scale
