"""Let batch norms take over the activation, and the residual sum, that follow them."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn import batchnorm as ours
from batchnorm.transforms.calls import largest_difference, tolerance
from batchnorm.transforms.convert import convert
from batchnorm.transforms.forwards import (
    Acting,
    has_hooks,
    put_back,
    replace_forward,
    replace_layer,
)
from batchnorm.transforms.layers import batch_norms
from batchnorm.transforms.observed import compare, observe
from batchnorm.transforms.sites import find
from batchnorm.transforms.takeable import ACTIVATION_MODULES, activation_of

__all__ = ["Fusing", "fuse", "unfuse"]


@dataclass(frozen=True)
class Fusing:
    """What :func:`fuse` did."""

    fused: dict[str, str]
    """What each batch norm took over, by its name: ``"relu"``, ``"add"``, ``"add, relu"``, ..."""
    left: dict[str, str]
    """Why a batch norm took over nothing, by its name."""
    largest_difference: float | None
    """By how much outputs and gradients changed on the example, over the largest value of each;
    None without an example."""

    def __str__(self) -> str:
        """Say how many were found, fused and left, and the reasons by how often they occur."""
        kinds = ", ".join(f"{n} × {kind}" for kind, n in Counter(self.fused.values()).most_common())
        text = f"{len(self.fused)} of {len(self.fused) + len(self.left)} batch norms fused"
        lines = [f"{text} ({kinds})" if kinds else text]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name or "the layer")
        lines += [f"left: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *example: Any, **named: Any) -> Fusing:
    r"""Let each batch norm activate, and add, in the pass in which it normalises.

    .. math:: \mathrm{act}(\mathrm{BN}(x)), \quad \mathrm{act}(\mathrm{BN}(x) + r), \quad
        \mathrm{BN}(x) + r

    become one call of our layer each, which keeps nothing but x (and r, or a bit for each value,
    where the derivative needs it) for its backward. Training goes on as it would have. All batch
    norms of torch's become ours first, as by :func:`convert`, and so do subclasses of them that
    only activate besides (``BatchNormAct2d`` of timm).

    Where this is possible is found by data flow: each module's own forward is traced with
    ``torch.fx``, so that a network that cannot be traced as a whole is fused block by block, and
    through the borders of modules where a place spans them. The activation may be a module,
    shared or not, or a function, in place or not; the sum any that has two operands. Of two batch
    norms that are added the one that is called beside the sum takes it, and of two such the one
    that runs last, since it can do so without waiting.

    Modules, parameters and names stay; the module whose forward has the place computes by
    another, as long as all that the tracing depended on holds: the arguments that were given,
    the attributes that were read (flags, children, the mode), and that what is skipped is what it
    was and has no hook. Else its own forward runs, whose layers are as they were. So hooks that
    are added later see what they always saw, and a changed network computes what it says. Only
    the globals that a forward reads count as they were, and what it prints is lost. Copies and
    pickles are fused, too. :func:`unfuse` undoes it.

    With an example the network, its batch norms ours already, is run before and after, in
    evaluation and in training, in float64 where it can be. Outputs, gradients and running
    statistics must agree, and what does not run as it was found is left. The sum of a residual
    of another shape or type than x is left to torch in any case, when it occurs.

    Args:
        model: The network, in any mode, changed in place.
        *example: What to call the network with, to verify it. Default: it is not run.
        **named: What to call it with by name.

    Returns:
        What was fused, and what was left and why. ``print`` it.

    Raises:
        ValueError: The network has no batch norm, or does not compute the same when fused. It is
            as it was then, as it is after any other error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)
        ... )
        >>> report = fuse(model, torch.randn(2, 3, 8, 8))
        >>> print(report)
        1 of 2 batch norms fused (1 × relu)
        left: 3: its output goes to the output of the network
        >>> report.largest_difference < 1e-8
        True
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    names: dict[nn.Module, str] = {layer: name for name, layer in batch_norms(model).items()}
    with ExitStack() as undo:
        undo.callback(_snapshot(model))
        unfuse(model)
        activating = _take_over(model)
        before = observe(model, example, named) if example or named else None
        excluded: dict[nn.Module, str] = {}
        while True:
            owners, left = find(model, excluded)
            for owner in owners:
                replace_forward(owner.module, owner.forwards)
            if before is None:
                largest = None
                break
            seen: dict[nn.Module, bool] = {}
            with ExitStack() as watch:
                for owner in owners:
                    for variant in owner.variants:
                        watch.callback(variant.watch(seen))
                after = observe(model, example, named, before.double)
            largest = compare(before, after)
            fused = {layer for owner in owners for v in owner.variants for layer in v.fused}
            wrong = {
                layer: "adds a value of another shape or type on the example"
                if layer in seen
                else "does not run on the example as its module's forward was traced"
                for layer in fused
                if not seen.get(layer)
            }
            if not wrong:
                break
            excluded |= wrong
            for owner in owners:
                put_back(owner.module)
        undo.pop_all()
    kinds: dict[nn.Module, set[str]] = {layer: {name} for layer, name in activating.items()}
    for owner in owners:
        for variant in owner.variants:
            for layer, found in variant.fused.items():
                kinds.setdefault(layer, set()).update(found)
    return Fusing(
        {name: "; ".join(sorted(kinds[layer])) for layer, name in names.items() if layer in kinds},
        {name: left[layer] for layer, name in names.items() if layer not in kinds},
        largest,
    )


def unfuse(model: nn.Module) -> nn.Module:
    """Let every module compute by its own forward again: the opposite of :func:`fuse`.

    Batch norms stay ours, but for those that were of another class that activates;
    :func:`revert` turns them to torch's. Exporters that know only torch's operations, such as
    that to ONNX, need both: ``revert(unfuse(model))``.

    Args:
        model: The network, changed in place.

    Returns:
        The same network.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        >>> _ = fuse(model)
        >>> type(unfuse(model)) is nn.Sequential
        True
    """
    for module in model.modules():
        put_back(module)
    return model


def _snapshot(model: nn.Module) -> Any:
    """Return what puts all modules back to what they are now."""
    kept = [
        (module, type(module), module.__dict__.copy(), module._buffers.copy())
        for module in model.modules()
    ]

    def restore() -> None:
        for module, cls, attributes, buffers in kept:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

    return restore


def _take_over(model: nn.Module) -> dict[nn.Module, str]:
    """Turn all batch norms that can be into ours; return those that activate themselves."""
    activating: dict[nn.Module, str] = {}
    tried: dict[Any, bool] = {}
    for layer in list(model.modules()):
        if not isinstance(layer, _BatchNorm) or (checks := _what_its_children_do(layer)) is None:
            continue
        activation = next((a for child in layer.children() if (a := activation_of(child))), None)
        # Layers of one class that are set up alike do alike, so that one of them is tried.
        alike = (
            type(layer), activation, *((check.name, check.cls) for check in checks),
            layer.affine, layer.track_running_stats, layer.momentum is None, layer.eps,
        )  # fmt: skip
        if alike not in tried:
            tried[alike] = _is_batch_norm_and(activation, checks, layer)
        if tried[alike]:
            replace_layer(layer, activation, checks)
            if activation is not None:
                activating[layer] = activation
    convert(model)
    return activating


def _what_its_children_do(layer: _BatchNorm) -> list[Acting] | None:
    """Return the checks of a subclass with identities and at most one activation, or None."""
    ranks = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not isinstance(layer, ranks) or type(layer) in ranks or isinstance(layer, ours._BatchNorm):
        return None
    if has_hooks(layer) or "forward" in layer.__dict__:
        return None
    checks = []
    activations = 0
    for name, child in layer.named_children():
        if has_hooks(child) or not (type(child) is nn.Identity or activation_of(child)):
            return None
        activations += type(child) is not nn.Identity
        options = ACTIVATION_MODULES.get(type(child), ("", {}))[1]
        checks.append(Acting(name, type(child), options))
    return checks if activations < 2 else None


def _is_batch_norm_and(activation: str | None, checks: list[Acting], layer: _BatchNorm) -> bool:
    """Try whether a layer normalises and activates and does nothing else, in both modes."""
    theirs, mine = copy.deepcopy(layer), copy.deepcopy(layer)
    replace_layer(mine, activation, checks)
    rank = next(r for r in (2, 1, 3) if isinstance(layer, getattr(nn, f"BatchNorm{r}d")))
    like = next((t for t in (*layer.parameters(), *layer.buffers())), torch.empty(0))
    x = torch.randn(
        (4, layer.num_features, *(3,) * rank), generator=torch.Generator().manual_seed(0)
    ).to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    with torch.no_grad():
        for training in (True, False):
            try:
                expected = theirs.train(training)(x.clone())
            except Exception:  # whatever it is, it is not a batch norm
                return False
            got = mine.train(training)(x.clone())
            if not isinstance(expected, Tensor):
                return False
            pairs = [([expected], [got]), (list(theirs.buffers()), list(mine.buffers()))]
            for old, new in pairs:
                largest, scale = largest_difference(old, new)
                if not largest <= tolerance(x) * scale:
                    return False
    return True
