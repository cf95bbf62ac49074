"""Put another forward in the place of a module's own, for as long as it computes the same.

The module stays the object that it is and its class a subclass of what it was, as
``torch.nn.utils.parametrize`` does it. What the new forward depends on is checked in each call,
and where it no longer holds, the old one runs.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import fx, nn
from torch.nn.modules import module as torch_module

from batchnorm.nn import batchnorm as ours
from batchnorm.transforms.freeze import is_freezing
from batchnorm.transforms.symbolic import Read

__all__ = [
    "Acting",
    "Forward",
    "Forwards",
    "ItsLayer",
    "Plain",
    "has_hooks",
    "original_class",
    "put_back",
    "replace_forward",
    "replace_layer",
]

_KEPT = "_batchnorm_replaced"
_MISSING = object()


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of this module does more than its forward, freezing set aside."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not is_freezing(hook) for hook in module._forward_pre_hooks.values())


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or what it was before its forward was replaced."""
    return getattr(type(module), "_original", type(module))


@dataclass(frozen=True)
class Plain:
    """Holds where a module that is not called any more is what it was, without hooks."""

    path: tuple[str, ...]
    cls: type[nn.Module]

    def __call__(self, module: nn.Module) -> bool:
        """Check it, from the module whose forward was replaced."""
        found = _at(module, self.path)
        return found is not None and original_class(found) is self.cls and not has_hooks(found)


@dataclass(frozen=True)
class ItsLayer:
    """Holds where a layer can take over what follows it: ours, not activating, without hooks."""

    path: tuple[str, ...]

    def __call__(self, module: nn.Module) -> bool:
        """Check it, from the module whose forward was replaced."""
        layer = _at(module, self.path)
        if not isinstance(layer, ours._BatchNorm) or layer.activation is not None:
            return False
        return not has_hooks(layer) and (not isinstance(layer, _ReplacedLayer) or layer._holds())


@dataclass(frozen=True)
class Acting:
    """Holds where a child of a batch norm is what its fused activation stands for."""

    name: str
    cls: type[nn.Module]
    options: dict[str, Any]

    def __call__(self, module: nn.Module) -> bool:
        """Check it, from the batch norm."""
        child = module._modules.get(self.name)
        return (
            child is not None
            and type(child) is self.cls
            and not has_hooks(child)
            and all(getattr(child, name) == value for name, value in self.options.items())
        )


def _at(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        if found is None:
            return None
        found = found._modules.get(name)
    return found


def _reads_the_same(module: nn.Module, read: Read) -> bool:
    owner = _at(module, read.path)
    if owner is None:
        return False
    if read.name == "_modules":
        return bool(tuple(owner._modules) == read.value)
    found = getattr(owner, read.name, _MISSING)
    return type(found) is type(read.value) and bool(found == read.value)


class Forward:
    """A graph as a function of the module and its arguments, and what it holds for."""

    def __init__(
        self,
        graph: fx.Graph,
        kind: type | None,
        reads: list[Read],
        checks: list[Plain | ItsLayer],
    ) -> None:
        code = graph.python_code("self")
        self._kind, self._reads, self._checks = kind, reads, checks
        self._source, self._globals = code.src, dict(code.globals)
        self._compile()

    def _compile(self) -> None:
        names = dict(self._globals)
        exec(compile(self._source, "<batchnorm.fuse>", "exec", dont_inherit=True), names)
        self.function: Callable[..., Any] = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["function"]
        # Modules of Python are named, as they cannot be pickled.
        state["_globals"] = {
            name: (value.__name__,) if isinstance(value, ModuleType) else value
            for name, value in self._globals.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._globals = {
            name: __import__(value[0], fromlist=["_"]) if isinstance(value, tuple) else value
            for name, value in self._globals.items()
        }
        self._compile()

    def __deepcopy__(self, memo: Any) -> Forward:
        return self  # nothing in it belongs to one module

    def holds(self, module: nn.Module, args: tuple[Any, ...]) -> bool:
        """Tell whether it computes for these arguments what the module's own forward does."""
        for arg in args:
            if arg is None:
                return False
            if self._kind is not None and not isinstance(arg, self._kind):
                return False
        for read in self._reads:
            if not _reads_the_same(module, read):
                return False
        for check in self._checks:  # noqa: SIM110  (a generator would cost more than the checks)
            if not check(module):
                return False
        return True


@dataclass
class Forwards:
    """The forwards of one module: one for each mode and kind of argument, if they differ."""

    needed: list[str]
    others: dict[str, Any]
    variants: list[Forward] = field(default_factory=list)

    def choose(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        """Return the forward that holds, and its arguments; None if none does."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return None
        count = len(self.needed)
        if kwargs or len(args) != count:
            names = [*self.needed, *self.others]
            given = dict(zip(names, args, strict=False)) | kwargs
            if len(args) > len(names) or any(
                name not in self.needed
                and (name not in self.others or value is not self.others[name])
                for name, value in given.items()
            ):
                return None
            if any(name not in given for name in self.needed):
                return None
            args = tuple([given[name] for name in self.needed])
        for variant in self.variants:
            if variant.holds(module, args):
                return variant.function, args
        return None


class _Replaced(nn.Module):
    """A module whose forward, or whose class, is another for now."""

    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        # The class is made when it is needed, and so not found by its name.
        kind = _ReplacedLayer if isinstance(self, _ReplacedLayer) else _ReplacedForward
        return (_new, (kind, self._original, *reduced[1][1:]), *reduced[2:])


class _ReplacedForward(_Replaced):
    """Its forward is in each class made of it, so that it can have the original's signature."""


class _ReplacedLayer(_Replaced):
    def _holds(self) -> bool:
        checks = self.__dict__.get(_KEPT)
        return checks is not None and all(check(self) for check in checks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._holds():
            return super().forward(*args, **kwargs)
        return super(ours._BatchNorm, self).forward(*args, **kwargs)  # type: ignore[misc]


def _new(kind: type[_Replaced], cls: type[nn.Module], *args: Any) -> nn.Module:
    made: Any = _subclass(kind, cls)
    module: nn.Module = made.__new__(made, *args)
    return module


_subclasses: dict[tuple[type, type], Any] = {}


def _subclass(kind: type[_Replaced], cls: Any) -> Any:
    """Return the class of both, always the same one."""
    if (kind, cls) in _subclasses:
        return _subclasses[kind, cls]
    bases: tuple[Any, ...] = (kind, cls)
    names: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_original": cls}
    if kind is _ReplacedLayer:
        ranks = (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d)
        names |= {"__init__": cls.__init__, "activation": None, "statistics": None, "guard": None}
        bases = (kind, next(r for r in ranks if issubclass(cls, getattr(nn, r.__name__))), cls)
    else:

        @functools.wraps(cls.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            forwards = self.__dict__.get(_KEPT)
            # None in what its own methods make of its class: a part of an nn.Sequential, say.
            found = None if forwards is None else forwards.choose(self, args, kwargs)
            if found is None:
                return cls.forward(self, *args, **kwargs)
            function, args = found
            return function(self, *args)

        names["forward"] = forward
    return _subclasses.setdefault((kind, cls), type(cls.__name__, bases, names))


def replace_forward(module: nn.Module, forwards: Forwards) -> None:
    """Let a module compute by other forwards where they hold."""
    module.__dict__[_KEPT] = forwards
    module.__class__ = _subclass(_ReplacedForward, type(module))


def replace_layer(layer: nn.Module, activation: str | None, checks: list[Acting]) -> None:
    """Turn a subclass of torch's batch norm that activates, too, into one of ours.

    Its children stay, and where they are not what the checks say, it computes as it did.
    """
    layer.__dict__[_KEPT] = checks
    layer.__class__ = _subclass(_ReplacedLayer, type(layer))
    layer.activation, layer.statistics, layer.guard = activation, None, None  # type: ignore[assignment]
    assert isinstance(layer, ours._BatchNorm)
    layer._widen_running_statistics()


def put_back(module: nn.Module) -> None:
    """Undo either, if it was done."""
    if not isinstance(module, _Replaced):
        return
    if isinstance(module, _ReplacedLayer):
        for name in ("activation", "statistics", "guard"):
            delattr(module, name)
    original: Any = module._original
    del module.__dict__[_KEPT]
    module.__class__ = original
