"""Where a batch norm is followed by what its layer could do in the same pass, by data flow."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn import batchnorm as ours
from batchnorm.transforms.dataflow import LINEAR_TYPES
from batchnorm.transforms.forwards import Forward, Forwards, ItsLayer, Plain, has_hooks
from batchnorm.transforms.symbolic import (
    Read,
    Traced,
    UntraceableError,
    parameters_of,
    path_to,
    trace_forward,
)
from batchnorm.transforms.takeable import (
    ACTIVATION_MODULES,
    activation_of,
    activation_of_function,
    add_and_activate,
    adds_in_place,
    fits,
    is_sum,
)

__all__ = ["Owner", "Site", "Variant", "find"]


@dataclass
class Site:
    """A batch norm and what it takes over."""

    layer: nn.Module
    norm: fx.Node
    chain: list[fx.Node]
    """What disappears: the batch norm, and then all up to the last operation."""
    sum: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str | None = None

    @property
    def kind(self) -> str:
        """What it takes over, in words."""
        return ", ".join(["add"] * (self.sum is not None) + [self.activation or ""]).strip(", ")


@dataclass
class Variant:
    """One forward of an owner, rewritten, and the layers that take something over in it."""

    forward: Forward
    fused: dict[nn.Module, list[str]]

    def watch(self, seen: dict[nn.Module, bool]) -> Callable[[], None]:
        """Note which layers run, and whether each could add what it was given.

        Returns what ends it.
        """
        function = self.forward.function
        names = function.__globals__

        def run(*args: Any) -> Any:
            for layer in self.fused:
                seen.setdefault(layer, True)
            return function(*args)

        def add(layer: Any, x: Tensor, residual: Any, *options: Any) -> Tensor:
            seen[layer] = seen.get(layer, True) and fits(x, residual)
            return add_and_activate(layer, x, residual, *options)

        kept = {name: value for name, value in names.items() if value is add_and_activate}

        def end() -> None:
            self.forward.function = function
            names.update(kept)

        self.forward.function = run
        names.update(dict.fromkeys(kept, add))
        return end


@dataclass
class Owner:
    """A module whose own forward has what can be fused."""

    module: nn.Module
    forwards: Forwards
    variants: list[Variant]


@dataclass
class _Found:
    """What there is in one graph."""

    traced: Traced
    inline: set[nn.Module]
    sites: list[Site] = field(default_factory=list)
    left: dict[nn.Module, str] = field(default_factory=dict)
    last: nn.Module | None = None
    """The batch norm whose output is that of the whole."""
    starts: bool = False
    """Whether all that takes the input is an activation."""


class _Finder:
    def __init__(self, model: nn.Module, excluded: dict[nn.Module, str]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.excluded = excluded
        self.found: dict[nn.Module, _Found] = {}
        self.starting: dict[nn.Module, bool] = {}
        self.untraceable: dict[nn.Module, str] = {}

    def inlined(self, owner: nn.Module, training: bool, kind: type) -> _Found:
        """Look at the forward of a module, and into children that a place spans."""
        found = self.look(owner, set(), training, kind)
        while more := self._spanned(owner, found):
            try:
                found = self.look(owner, found.inline | more, training, kind)
            except UntraceableError:
                break
        return found

    def look(self, owner: nn.Module, inline: set[nn.Module], training: bool, kind: type) -> _Found:
        found = _Found(trace_forward(owner, inline, training=training, kind=kind), inline)
        graph = found.traced.graph
        claimed: dict[fx.Node, nn.Module] = {}
        # From the last: of two batch norms that are added, the later can add without waiting.
        for node in reversed(graph.nodes):
            layer = self._called(owner, node)
            if not isinstance(layer, _BatchNorm):
                continue
            site = self._site(owner, node, layer, claimed)
            if isinstance(site, str):
                found.left[layer] = site
            else:
                found.sites.append(site)
                if site.sum is not None:
                    claimed[site.sum] = layer
        result = next(node for node in graph.nodes if node.op == "output").args[0]
        if isinstance(result, fx.Node):
            called = self._called(owner, self._before_identities(owner, result))
            found.last = called if called in found.left else self._last(called)
        found.starts = self._starts_with_activation(owner, graph)
        return found

    def _starts_with_activation(self, owner: nn.Module, graph: fx.Graph) -> bool:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1 or len(inputs[0].users) != 1:
            return False
        user = next(iter(inputs[0].users))
        return self._activation(owner, user) is not None or self._starts(self._called(owner, user))

    def _called(self, owner: nn.Module, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        assert isinstance(node.target, str)
        return owner.get_submodule(node.target)

    def _last(self, module: nn.Module | None) -> nn.Module | None:
        return self.found[module].last if module in self.found else None

    def _starts(self, module: nn.Module | None) -> bool:
        if module is None or not _has_forward_of_its_own(module):
            return False
        if module not in self.starting:
            self.starting[module] = False
            try:
                graph = trace_forward(module, set(), training=True, kind=Tensor).graph
                self.starting[module] = self._starts_with_activation(module, graph)
            except UntraceableError:
                pass
        return self.starting[module]

    def _spanned(self, owner: nn.Module, found: _Found) -> set[nn.Module]:
        """Return children at the border of which a place to fuse is cut in two."""
        spanned: set[nn.Module] = set()
        for node in found.traced.graph.nodes:
            module = self._called(owner, node)
            last = module if module in found.left else self._last(module)
            if module is None or last is None:
                continue
            user = self._after_identities(owner, node, [])
            if isinstance(user, str):
                continue
            taker = next((site.layer for site in found.sites if site.sum is user), None)
            if taker is not None and module is not last:
                found.left[last] = f"its output is what {self.names[taker]} adds"
                continue
            into = self._called(owner, user)
            if self._activation(owner, user) or is_sum(user):
                pieces = {module} - {last}
            elif self._starts(into):
                assert into is not None
                pieces = {module, into} - {last}
            else:
                continue
            closed = [m for m in pieces if has_hooks(m) or "forward" in m.__dict__]
            if closed:
                found.left[last] = (
                    f"between it and {self._describe(owner, user)} lies the border of "
                    f"{self.names[closed[0]]}, which has a hook"
                )
            else:
                spanned |= pieces
        for site in found.sites:
            if site.sum is not None and site.activation is None:
                user = self._after_identities(owner, site.sum, [])
                into = self._called(owner, user) if isinstance(user, fx.Node) else None
                if into is not None and self._starts(into) and not has_hooks(into):
                    spanned.add(into)
        return spanned

    def _before_identities(self, owner: nn.Module, node: fx.Node) -> fx.Node:
        while _is_identity(self._called(owner, node)) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _after_identities(
        self, owner: nn.Module, node: fx.Node, passed: list[fx.Node]
    ) -> fx.Node | str:
        """Return what takes a value, and only once, or why that cannot be said."""
        while True:
            users = list(node.users)
            if not users:
                return "nothing takes its output"
            if len(users) > 1 or sum(n is node for n in _arguments(users[0])) > 1:
                where = " and ".join(self._describe(owner, user) for user in users)
                twice = " twice" if len(users) == 1 else ""
                return f"its output goes to {where}{twice}"
            node = users[0]
            if not _is_identity(self._called(owner, node)):
                return node
            passed.append(node)

    def _activation(self, owner: nn.Module, node: fx.Node) -> str | None:
        called = self._called(owner, node)
        if called is not None:
            return None if has_hooks(called) else activation_of(called)
        return activation_of_function(node)

    def _site(
        self, owner: nn.Module, norm: fx.Node, layer: nn.Module, claimed: dict[fx.Node, nn.Module]
    ) -> Site | str:
        if reason := self.excluded.get(layer) or _unsuitable(layer, norm):
            return reason
        site = Site(layer, norm, [norm])
        passed: list[fx.Node] = []
        user = self._after_identities(owner, norm, passed)
        if isinstance(user, str):
            return user
        if is_sum(user):
            if user in claimed:
                return f"its output is what {self.names[claimed[user]]} adds"
            last = (passed or [norm])[-1]
            reason = self._cannot_add(owner, norm, user, last)
            if reason:
                return reason
            site.chain += [*passed, user]
            site.sum = user
            site.residual = next(n for n in user.args[:2] if n is not last)  # type: ignore[assignment]
            passed = []
            behind = self._after_identities(owner, user, passed)
            if isinstance(behind, str):
                return site
            user = behind
        activation = self._activation(owner, user)
        if activation is not None:
            site.chain += [*passed, user]
            site.activation = activation
        if site.sum is None and activation is None:
            return f"its output goes to {self._describe(owner, user)}"
        return site

    def _cannot_add(self, owner: nn.Module, norm: fx.Node, total: fx.Node, value: fx.Node) -> str:
        """Say why a sum cannot be taken over, or nothing."""
        where = self._describe(owner, total)
        alpha = total.kwargs.get("alpha", 1)
        if len(total.args) != 2 or set(total.kwargs) - {"alpha"} or alpha != 1:
            return f"its output goes to {where}, which does more than add"
        residual = total.args[1] if total.args[0] is value else total.args[0]
        if not isinstance(residual, fx.Node):
            return f"its output goes to {where}, which adds a number"
        alone = self._is_fresh(owner, residual) and len(residual.users) == 1
        if adds_in_place(total) and total.args[0] is not value and not alone:
            return f"its output goes to {where}, which changes a value in place"
        layer = self._called(owner, norm)
        x = norm.args[0]
        assert isinstance(x, fx.Node)
        values = self._same_storage(owner, x)
        node = norm.next
        while node is not total:
            module = self._called(owner, node)
            if module is not None and any(m is layer for m in module.modules()):
                return "it runs again before its output is added"
            if values & set(node.all_input_nodes) and self._may_write(module, node):
                return (
                    f"its output is added only behind {self._describe(owner, node)}, which may "
                    "change its input in place"
                )
            node = node.next
        return ""

    def _same_storage(self, owner: nn.Module, value: fx.Node) -> set[fx.Node]:
        """Return the values that may be a tensor, what it is a view of, or a view of either."""
        values: set[fx.Node] = set()
        waiting = [value]
        while waiting:
            node = waiting.pop()
            if node not in values:
                values.add(node)
                if not self._is_fresh(owner, node):
                    waiting += node.all_input_nodes
        for node in value.graph.nodes:
            if values & set(node.all_input_nodes) and not self._is_fresh(owner, node):
                values.add(node)
        return values

    def _is_fresh(self, owner: nn.Module, node: fx.Node) -> bool:
        """Tell whether a value shares its memory with no other."""
        return isinstance(self._called(owner, node), (*LINEAR_TYPES, _BatchNorm))

    def _may_write(self, module: nn.Module | None, node: fx.Node) -> bool:
        if module is not None:
            return any(
                getattr(m, "inplace", False) or not type(m).__module__.startswith("torch.nn.")
                for m in module.modules()
                if not isinstance(m, _BatchNorm)
            )
        name = node.target if isinstance(node.target, str) else node.target.__name__
        return (
            name.endswith("_")
            or (name.startswith("i") and getattr(operator, name, None) is node.target)
            or node.kwargs.get("inplace", False) is not False
            or any(a is True for a in node.args)
            or "out" in node.kwargs
        )

    def _describe(self, owner: nn.Module, node: fx.Node) -> str:
        inside = self.names[owner]
        if node.op == "output":
            return f"the output of {inside}" if inside else "the output of the network"
        module = self._called(owner, node)
        if module is not None:
            name = ".".join([inside, str(node.target)]).strip(".")
            hooked = ", which has a hook" if has_hooks(module) else ""
            if type(module).__module__.startswith("torch.nn.") and len(module._modules) == 0:
                return f"{name}, {module}{hooked}"
            return f"{name}, a {type(module).__name__}{hooked}"
        name = node.target if isinstance(node.target, str) else node.target.__name__
        options = ", ".join(
            [str(a) for a in node.args[1:] if not isinstance(a, fx.Node)]
            + [f"{k}={v}" for k, v in node.kwargs.items() if not isinstance(v, fx.Node)]
        )
        return f"{name}(..., {options})" if options else str(name)


def _has_forward_of_its_own(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.")


def _is_identity(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and not has_hooks(module)


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _unsuitable(layer: nn.Module, norm: fx.Node) -> str:
    if not isinstance(layer, ours._BatchNorm):
        return f"is a {type(layer).__name__}, which may do more than normalise"
    if layer.activation is not None:
        return f"activates already, by {layer.activation}"
    if has_hooks(layer):
        return "has a hook, which would see its output changed"
    if len(norm.args) != 1 or norm.kwargs:
        return "is called with more than its input"
    return ""


def _rewrite(graph: fx.Graph, site: Site) -> None:
    x = site.norm.args[0]
    if site.sum is None:
        with graph.inserting_before(site.norm):
            new = graph.call_module(site.norm.target, (x,), {"activation": site.activation})  # type: ignore[arg-type]
    else:
        in_place = adds_in_place(site.sum)
        with graph.inserting_before(site.sum):
            layer = graph.get_attr(site.norm.target)  # type: ignore[arg-type]
            new = graph.call_function(
                add_and_activate, (layer, x, site.residual, site.activation, in_place)
            )
    site.chain[-1].replace_all_uses_with(new)
    for node in reversed(site.chain):
        graph.erase_node(node)


def find(
    model: nn.Module, excluded: dict[nn.Module, str]
) -> tuple[list[Owner], dict[nn.Module, str]]:
    """Return the modules whose forward has something to fuse, and why layers have nothing.

    Args:
        model: The network.
        excluded: Layers to leave, and why.
    """
    finder = _Finder(model, excluded)
    owners: list[Owner] = []
    left: dict[nn.Module, str] = {}
    fused: dict[nn.Module, list[str]] = {}
    for module in reversed(_holders(model)):
        try:
            if "forward" in module.__dict__:
                raise UntraceableError("was replaced on the object")
            needed, others = parameters_of(module)
            first = finder.found[module] = finder.inlined(module, True, Tensor)
        except UntraceableError as error:
            finder.untraceable[module] = str(error)
            continue
        variants = []
        for training, kind in ((True, Tensor), (False, Tensor), (True, list), (False, list)):
            found = first
            if not training or kind is list:
                if not (
                    (training or first.traced.asks_mode)
                    and (kind is Tensor or first.traced.asks_kind)
                ):
                    continue
                try:
                    found = finder.inlined(module, training, kind)
                except UntraceableError:
                    continue  # there, its own forward runs
            left |= found.left
            if found.sites:
                asked = kind if first.traced.asks_kind else None
                variants.append(_variant(module, found, asked))
                fused.update(variants[-1].fused)
        if variants:
            forwards = Forwards(needed, others, [variant.forward for variant in variants])
            owners.append(Owner(module, forwards, variants))
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer not in fused and layer not in left:
            left[layer] = excluded.get(layer) or _why_unseen(model, name, finder)
    return owners, {layer: reason for layer, reason in left.items() if layer not in fused}


def _holders(model: nn.Module) -> list[nn.Module]:
    """Return the modules that may call a batch norm in their own forward."""
    return [
        module
        for module in model.modules()
        if not isinstance(module, _BatchNorm)
        and _has_forward_of_its_own(module)
        and any(isinstance(m, _BatchNorm) for m in module.modules())
    ]


def _variant(module: nn.Module, found: _Found, kind: type | None) -> Variant:
    names = {m: name for name, m in module.named_modules()}
    reads = list(found.traced.reads)
    checks: list[Plain | ItsLayer] = [Plain(path_to(names[m]), type(m)) for m in found.inline]
    fused: dict[nn.Module, list[str]] = {}
    for site in found.sites:
        fused.setdefault(site.layer, []).append(site.kind)
        checks.append(ItsLayer(path_to(names[site.layer])))
        for node in site.chain[1:]:
            if node.op == "call_module":
                path = path_to(str(node.target))
                gone = type(module.get_submodule(str(node.target)))
                checks.append(Plain(path, gone))
                for name, value in ACTIVATION_MODULES.get(gone, ("", {}))[1].items():
                    reads.append(Read(path, name, value))
        _rewrite(found.traced.graph, site)
    return Variant(Forward(found.traced.graph, kind, reads, checks), fused)


def _why_unseen(model: nn.Module, name: str, finder: _Finder) -> str:
    """Say why no forward that could be traced calls a layer."""
    parts = name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        holder = model.get_submodule(".".join(parts[:count]))
        if holder in finder.untraceable:
            where = f"the forward of {finder.names[holder] or type(holder).__name__}"
            return f"{where} {finder.untraceable[holder]}"
    return "no forward calls it, as far as can be traced"
