"""Merge batch norms into the linear operations beside them, for inference."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from batchnorm.transforms.calls import (
    Calls,
    behind,
    follow,
    largest_difference,
    reserved,
    taker_name,
    tolerance,
)
from batchnorm.transforms.dataflow import preserved
from batchnorm.transforms.layers import batch_norms, statistics_finite
from batchnorm.transforms.tail import tail

__all__ = ["Folding", "fold"]

_BEFORE = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}


@dataclass(frozen=True)
class Folding:
    """What :func:`fold` did."""

    folded: dict[str, tuple[str, ...]]
    """Names of the linear operations that each batch norm went into, by its name."""
    left: dict[str, str]
    """Why a batch norm stayed, by its name."""
    differences: dict[str, float]
    """By how much the values changed where each folded batch norm was, at most and over the
    largest of them."""
    largest_difference: float
    """By how much the output of the network changed on the example, at most, absolutely."""
    channels_last: bool
    """Whether two-dimensional convolutions were laid out channels last."""


_Place = tuple[nn.Module, str]  # a parent and the name of its child


@dataclass
class _Plan:
    """A batch norm, what it goes into, and what stays in its place."""

    layer: _BatchNorm
    into: list[nn.Module]
    tail: nn.Module
    channels: dict[nn.Module, Tensor] | None
    """For a batch norm in front: its channel for each input channel of what it goes into."""


def fold(model: nn.Module, *example: Any, **named: Any) -> Folding:
    r"""Merge each batch norm into the linear operation before it, or behind it, for inference.

    With γ' = γ/√(σ² + ε) of the running statistics, a batch norm behind a linear operation
    disappears into

    .. math:: W' = \gamma' W, \qquad b' = \beta + \gamma' (b - \mu)

    and one in front of it into :math:`W' = W\gamma'`, :math:`b' = b + W(\beta - \gamma'\mu)`,
    input channel by input channel. That is for any convolution, transposed ones, groups and
    dilation included, and for ``Linear`` with input of any rank; in front only of ``Linear`` and
    of convolutions that do not pad with zeros, as the zeros would have to be normalised too.

    The network is run on the example, and what takes what is seen, whatever way it is written.
    A batch norm is folded only if the output of the linear operation goes nowhere else, and
    nothing but moves (``transpose``, ``flatten``, ...) stands between. One that is used several
    times is folded if all its uses can be. An activation in the layer stays, as a module; in a
    subclass, the children that account for what it does beyond normalising.

    Then the network is run again. A batch norm behind which more than 1e-4 of the largest value
    changed (16 times the precision of the type, where that is coarser) is not folded.

    On the CPU the weights of two-dimensional convolutions are laid out channels last, and so is
    what they return: there the convolutions are faster. They stay contiguous where the network
    fails with it, as one that calls ``view`` may, or where its output would be laid out otherwise
    than before.

    Args:
        model: The network in evaluation mode, changed in place: batch norms become identities,
            and weights and biases become new parameters.
        *example: What to call the network with. Control flow is that which the example takes.
        **named: What to call it with by name.

    Returns:
        What was folded into what, what was left and why, and how much changed.

    Raises:
        ValueError: The network has no batch norm or is in training mode, or its output changed
            though no layer did. It is as it was, then, as it is after any other error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)
        ... )
        >>> report = fold(model.eval(), torch.randn(2, 3, 8, 8))
        >>> report.folded, report.largest_difference < 1e-5
        ({'1': ('0',)}, True)
        >>> list(report.left)
        ['3']

    References:
        Jacob et al. 2018, arXiv 1712.05877, section 3.2; [P1] arXiv 1502.03167, Algorithm 2,
        line 11.
    """
    layers = batch_norms(model)
    if model.training:
        raise ValueError(
            "the network is in training mode, where batch norm uses the batch and cannot be "
            "folded; call model.eval() first, and train no further after folding"
        )
    names = {module: name for name, module in model.named_modules()}
    places: dict[nn.Module, list[_Place]] = {layer: [] for layer in layers.values()}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module in places:
                places[module].append((parent, child))
    refused: dict[str, str] = {}
    while True:
        with ExitStack() as undo:
            tails: dict[_BatchNorm, nn.Module | None] = {}
            before = calls = _follow(model, example, named, tails)
            plans: list[_Plan] = []
            while found := _find(layers, names, calls, tails, refused)[0]:
                for plan in found:
                    _apply(plan, places, undo)
                plans += found
                calls = _follow(model, example, named, tails)  # what folds now that these did
            left = _find(layers, names, calls, tails, refused)[1]
            for plan in plans:
                left.pop(names[plan.layer], None)
            channels_last = _lay_out(plans, torch.channels_last)
            try:
                differences, output = _compare(model, example, named, before, plans, names)
            except RuntimeError:  # of the layout, or it is raised again
                as_before = False
            else:
                as_before = _strides(output) == _strides(before.output)
            if not as_before:
                _lay_out(plans, torch.contiguous_format)
                channels_last = False
                differences, output = _compare(model, example, named, before, plans, names)
            limits = {names[p.layer]: tolerance(p.into[0].weight) for p in plans}
            worse = next((n for n, d in differences.items() if not d <= limits[n]), None)
            if worse is not None:
                refused[worse] = (
                    f"folding it would change its output by {differences[worse]:.1g} of the "
                    "largest value"
                )
                continue  # and put everything back
            largest, scale = largest_difference(before.output, output)
            if plans and not largest <= max(limits.values()) * scale:
                raise ValueError(
                    f"the folded network's output differs by {largest:.1g} (largest value "
                    f"{scale:.1g}) though no layer's does: it uses its layers otherwise than by "
                    "calling them, is not the same from run to run, or lets rounding grow (fold "
                    "model.double() then, and turn it back)"
                )
            undo.pop_all()
            folded = {names[p.layer]: tuple(names[m] for m in p.into) for p in plans}
            return Folding(folded, left, differences, largest, channels_last)


def _follow(
    model: nn.Module,
    example: tuple[Any, ...],
    named: dict[str, Any],
    tails: dict[_BatchNorm, nn.Module | None],
) -> Calls:
    def examine(layer: _BatchNorm, x: Tensor, y: Tensor) -> None:
        if layer not in tails or tails[layer] is not None:
            tails[layer] = tail(layer, x, y)

    return follow(model, example, named, _sample, examine)


def _sample(values: Tensor) -> Tensor:
    """Return some thousand values, of any channel and position."""
    step = values.numel() // 4096 | 1  # odd, against the powers of 2 that shapes are made of
    return values.detach().flatten()[::step].clone()


def _find(
    layers: dict[str, _BatchNorm],
    names: dict[nn.Module, str],
    calls: Calls,
    tails: dict[_BatchNorm, nn.Module | None],
    refused: dict[str, str],
) -> tuple[list[_Plan], dict[str, str]]:
    """Say what can be folded, and why the rest cannot."""
    plans, left = [], {}
    for name, layer in layers.items():
        reason = refused.get(name) or _unsuitable(layer, calls)
        after = tails.get(layer)
        if not reason and after is None:
            reason = f"is a {type(layer).__name__}, which does more than normalise"
        if reason:
            left[name] = reason
            continue
        assert after is not None
        into = behind(layer, names, calls)
        if not isinstance(into, str):
            plans.append(_Plan(layer, into, after, None))
            continue
        front = (
            _in_front(layer, names, calls)
            if isinstance(after, nn.Identity)
            else "its activation stands before what takes its output"
        )
        if isinstance(front, str):
            left[name] = f"{into}; {front}"
        else:
            plans.append(_Plan(layer, list(front), after, front))
    return plans, left


def _unsuitable(layer: _BatchNorm, calls: Calls) -> str:
    if layer not in calls.of:
        return "does not run on the example"
    if layer.training:
        return "is in training mode; call its eval()"
    if layer.running_mean is None or layer.running_var is None:
        return "keeps no running statistics, so that it uses the batch"
    if not statistics_finite(layer):
        return "has running statistics that are not finite or a negative variance; recalibrate it"
    return reserved(layer, calls)


def _in_front(
    layer: _BatchNorm, names: dict[nn.Module, str], calls: Calls
) -> dict[nn.Module, Tensor] | str:
    """Return what takes the layer's output, with channels, or why it cannot fold."""
    into: dict[nn.Module, Tensor] = {}
    for call in calls.of[layer]:
        if not call.takers:
            return "nothing takes its output"
        for taker in call.takers:
            if isinstance(taker, str) or isinstance(taker.module, _BatchNorm):
                return f"its output goes to {taker_name(taker, names)}"
            if reason := reserved(taker.module, calls) or _pads(taker.module):
                return f"{names[taker.module]} {reason}"
            into[taker.module] = torch.empty(0)
    for module in into:
        channels = []
        for call in calls.of[module]:
            if call.source is None or call.source.module is not layer:
                return f"{names[module]} takes something else as well"
            last = len(call.input_shape) - 1
            found = call.source_channels(
                last if isinstance(module, nn.Linear) else call.channel_axis
            )
            if found is None:
                return f"axis 1, which it normalises, is not the input axis of {names[module]}"
            channels.append(found)
        if any(not torch.equal(c, channels[0]) for c in channels):
            return f"{names[module]} takes its channels in different orders"
        into[module] = channels[0]
    return into


def _pads(module: nn.Module) -> str:
    if type(module) not in _BEFORE:
        return f"is a {type(module).__name__}, whose borders not every weight reaches"
    if isinstance(module, _ConvNd) and module.padding_mode == "zeros":
        padding = module.padding
        if (padding == "same" and max(module.kernel_size) > 1) or (
            not isinstance(padding, str) and any(padding)
        ):
            return "pads with zeros, which would have to be normalised too"
    return ""


def _apply(plan: _Plan, places: dict[nn.Module, list[_Place]], undo: ExitStack) -> None:
    layer = plan.layer
    assert layer.running_mean is not None
    assert layer.running_var is not None
    with torch.no_grad():
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight.double()
        shift = -layer.running_mean.double() * scale
        if layer.bias is not None:
            shift = shift + layer.bias.double()
        for module in plan.into:
            weight = module.get_parameter("weight")
            old = module._parameters["bias"]
            bias = torch.zeros_like(shift[:1]) if old is None else old.double()
            if plan.channels is None:
                groups = module.groups if isinstance(module, _ConvTransposeNd) else 1
                transposed = isinstance(module, _ConvTransposeNd)
                factor = _spread(weight, scale, groups) if transposed else _rows(weight, scale)
                bias = bias * scale + shift
                folded = weight.double() * factor
            else:
                groups = module.groups if isinstance(module, _ConvNd) else 1
                at = plan.channels[module].to(scale.device)
                wide = weight.double()
                bias = bias + (wide * _spread(weight, shift[at], groups)).flatten(1).sum(1)
                folded = wide * _spread(weight, scale[at], groups)
            for name, value in (("weight", folded), ("bias", bias)):
                undo.callback(module._parameters.__setitem__, name, module._parameters[name])
                module._parameters[name] = nn.Parameter(
                    value.to(weight.dtype), requires_grad=weight.requires_grad
                )
    for parent, child in places[layer]:
        undo.callback(parent._modules.__setitem__, child, layer)
        parent._modules[child] = plan.tail


def _rows(weight: Tensor, values: Tensor) -> Tensor:
    """Return one value for each row of the weight."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _spread(weight: Tensor, values: Tensor, groups: int) -> Tensor:
    """Return one value for each row and column of the weight, whose columns are of one group."""
    rows, columns = weight.shape[:2]
    group = torch.arange(rows, device=values.device) // (rows // groups)
    index = group[:, None] * columns + torch.arange(columns, device=values.device)
    return values[index].view(rows, columns, *[1] * (weight.dim() - 2))


def _lay_out(plans: list[_Plan], memory_format: torch.memory_format) -> bool:
    """Lay out the weights that are new, on the CPU; say whether there are any."""
    convolutions = [
        module
        for plan in plans
        for module in plan.into
        if isinstance(module, nn.Conv2d) and module.weight.device.type == "cpu"
    ]
    for module in convolutions:
        module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
    return bool(convolutions)


def _strides(output: list[Tensor]) -> list[list[int]]:
    """Return the strides that matter."""
    return [
        [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1]
        for t in output
    ]


def _compare(
    model: nn.Module,
    example: tuple[Any, ...],
    named: dict[str, Any],
    before: Calls,
    plans: list[_Plan],
    names: dict[nn.Module, str],
) -> tuple[dict[str, float], list[Tensor]]:
    """Run the folded network; return what changed where, and its output."""
    places = {plan.layer: _places(plan, plans) for plan in plans}
    samples: dict[nn.Module, list[Tensor]] = {
        now: [] for found in places.values() for _, now in found
    }
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        for module, found in samples.items():

            def keep(_: Any, __: Any, y: Tensor, found: list[Tensor] = found) -> None:
                found.append(_sample(y))

            stack.callback(module.register_forward_hook(keep).remove)
        with torch.no_grad():
            output = [t for t in tree_leaves(model(*example, **named)) if isinstance(t, Tensor)]
    differences = {}
    for plan in plans:
        worst = 0.0
        for then, now in places[plan.layer]:
            was, found = before.of[then], samples[now]
            if len(was) != len(found):
                worst = float("inf")
                continue
            old = [call.sample for call in was if call.sample is not None]
            largest, scale = largest_difference(old, found)
            worst = max(worst, largest / scale if scale else largest)
        differences[names[plan.layer]] = worst
    return differences, output


def _places(plan: _Plan, plans: list[_Plan]) -> list[tuple[nn.Module, nn.Module]]:
    """Return where a folded batch norm shows: a module before folding, and one after."""
    places = []
    for module in plan.into:
        behind = [p for p in plans if p.channels is None and module in p.into]
        # Of several that went into one operation, its output is that of the last.
        places.append((behind[-1].layer, behind[-1].tail) if behind else (module, module))
    return places
