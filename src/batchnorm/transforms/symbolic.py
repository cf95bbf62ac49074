"""The operations that one module's own ``forward`` is made of, and all that they depend on.

``torch.fx`` traces a forward by running it on proxies. What it reads from Python meanwhile (a flag,
the mode, which children there are) is frozen into the graph without a word, and what it writes
is lost. Here each such read is noted, so that the graph can be guarded by it, and what could not
be noticed is refused.
"""

from __future__ import annotations

import enum
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

__all__ = [
    "MODE",
    "Read",
    "Traced",
    "UntraceableError",
    "parameters_of",
    "path_to",
    "trace_forward",
]

MODE = "training"
_OF_EVERY_MODULE = frozenset(dir(nn.Module())) - {MODE}
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
    type, FunctionType, BuiltinFunctionType,
)  # fmt: skip
# Asked when a context such as no_grad() or autocast() is entered, too, which a graph does not keep.
_ABOUT_THE_CONTEXT = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")


class UntraceableError(Exception):
    """A forward is not the same list of operations each time; its text says why."""


@dataclass(frozen=True)
class Read:
    """An attribute that a forward reads: of which module under it, and what it found."""

    path: tuple[str, ...]
    name: str
    value: Any


@dataclass
class Traced:
    """A forward as a graph, and what it holds for."""

    graph: fx.Graph
    reads: list[Read] = field(default_factory=list)
    asks_mode: bool = False
    asks_kind: bool = False
    """Whether it asks of what type an argument is."""


def path_to(name: str) -> tuple[str, ...]:
    """Return a dotted name as a path."""
    return tuple(name.split(".")) if name else ()


def parameters_of(module: nn.Module) -> tuple[list[str], dict[str, Any]]:
    """Return which arguments a forward needs, and what the others are if not given.

    Raises:
        UntraceableError: one is needed and can only be given by name.
    """
    needed: list[str] = []
    others: dict[str, Any] = {}
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty:
            others[parameter.name] = parameter.default
        elif parameter.kind == parameter.KEYWORD_ONLY:
            raise UntraceableError(f"takes {parameter.name!r} by name only")
        else:
            needed.append(parameter.name)
    return needed, others


def trace_forward(
    module: nn.Module, inline: set[nn.Module], *, training: bool, kind: type
) -> Traced:
    """Trace the forward of a module, every child a single node.

    Arguments that have a default are at it.

    Args:
        module: Whose forward.
        inline: Modules under it that are traced through instead.
        training: The mode to trace in, of all modules. None changes it.
        kind: What an argument says it is if asked: ``Tensor`` or ``list``.

    Raises:
        UntraceableError: The operations depend on values, or on something that could change
            unnoticed, or the forward does more than compute.
    """
    tracer = _Tracer(module, inline, training, kind)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with tracer.watched():
            tracer.result.graph = tracer.trace(module)
    except UntraceableError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UntraceableError(f"cannot be traced: {lines[0]}") from error
    after = np.random.get_state()  # noqa: NPY002
    drawn = (
        not torch.equal(state[0], torch.get_rng_state())
        or state[1] != random.getstate()
        or any(not np.array_equal(a, b) for a, b in zip(state[2], after, strict=True))
    )
    if drawn:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
        raise UntraceableError("draws random numbers of its own")
    return tracer.result


class _Value(fx.Proxy):
    """A proxy that answers ``isinstance`` as the value would."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        tracer = self.tracer
        assert type(tracer) is _Tracer
        return tracer.kind_of(self.node)


class _Tracer(fx.Tracer):
    # Else a buffer would be changed for real by a forward that does so.
    proxy_buffer_attributes = True

    def __init__(
        self, module: nn.Module, inline: set[nn.Module], training: bool, kind: type
    ) -> None:
        super().__init__()
        self.result = Traced(fx.Graph())
        self._inline, self._training, self._kind = inline, training, kind
        self._paths = {m: path_to(name) for name, m in module.named_modules()}
        self._watching = False
        self._seen: set[tuple[tuple[str, ...], str]] = set()
        self._mutable: list[tuple[str, Any, Any]] = []

    def kind_of(self, node: fx.Node) -> type:
        if not self._watching:
            return _Value
        if node.op == "placeholder":
            self.result.asks_kind = True
            return self._kind
        if node.op == "call_module":
            assert isinstance(node.target, str)
            called = self.root.get_submodule(node.target)
            if not type(called).__module__.startswith("torch.nn."):
                raise UntraceableError(f"asks of what type the output of {node.target} is")
        return Tensor

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See what modules are asked for, and let nothing be written."""
        tracer = self

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if tracer._watching and (name not in _OF_EVERY_MODULE or name == "_modules"):
                return tracer._read(module, name, value)
            return value

        write = nn.Module.__setattr__

        def refuse(module: nn.Module, name: str, value: Any) -> None:
            if tracer._watching:
                raise UntraceableError(f"sets its attribute {name!r}")
            write(module, name, value)

        def asked(name: str) -> Callable[..., bool]:
            original = getattr(torch, name)

            def ask(*args: Any) -> Any:
                if tracer._watching:
                    raise UntraceableError(f"asks torch.{name}(), or changes the answer")
                return original(*args)

            return ask

        with ExitStack() as stack:
            nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
            stack.callback(delattr, nn.Module, "__getattribute__")
            stack.callback(setattr, nn.Module, "__setattr__", write)
            nn.Module.__setattr__ = refuse  # type: ignore[method-assign, assignment]
            for name in _ABOUT_THE_CONTEXT:
                stack.callback(setattr, torch, name, getattr(torch, name))
                setattr(torch, name, asked(name))
            try:
                yield
            finally:
                tracer._watching = False
                changed = [m for m in tracer._mutable if m[1] != m[2]]
                for _, value, before in changed:
                    value.clear()
                    value.extend(before) if isinstance(value, list) else value.update(before)
            if changed:
                raise UntraceableError(f"changes its attribute {changed[0][0]!r}")

    @contextmanager
    def _aside(self) -> Iterator[None]:
        watching, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = watching

    def _read(self, module: nn.Module, name: str, value: Any) -> Any:
        if isinstance(value, MethodType | nn.Module | Tensor) or name.startswith("__"):
            return value
        with self._aside():
            path = self._paths.get(module)
        if path is None:
            raise UntraceableError(f"reads {name!r} of a module that is not under it")
        if name == MODE:
            self.result.asks_mode = True
            value = self._training
        if (path, name) in self._seen:
            return value
        self._seen.add((path, name))
        kept = value
        if name == "_modules":
            kept = tuple(value)
        elif not _is_plain(value):
            raise UntraceableError(
                f"reads {name!r}, a {type(value).__name__}, which may change unnoticed"
            )
        elif isinstance(value, list | dict | set):
            kept = value.copy()
            self._mutable.append((name, value, kept))
        self.result.reads.append(Read(path, name, kept))
        return value

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        needed, _ = parameters_of(self.root)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in needed]

        def forward(*args: Any) -> Any:
            self._watching = True
            return root_fn(*args)

        return forward, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._inline

    def path_of_module(self, mod: nn.Module) -> str:
        with self._aside():
            return super().path_of_module(mod)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        with self._aside():
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        with self._aside():
            if isinstance(a, dict | list) and type(a) not in (dict, list):
                raise UntraceableError(f"makes a {type(a).__name__}, which a graph would not keep")
            if (
                isinstance(a, Tensor)
                and a not in self.tensor_attrs
                and not any(a is known for known in (*self.root.parameters(), *self.root.buffers()))
            ):
                raise UntraceableError("makes a tensor that does not depend on its input")
            return super().create_arg(a)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
