"""Which module's output goes where: found by running the network once on an example.

Running it, rather than reading its code or the order of its children, sees through any control
flow and any way of writing the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["INSERTED", "LINEAR_TYPES", "Flow", "preserved", "trace"]

INSERTED = "batchnorm_inserted"
"""Name of the child that :func:`~batchnorm.transforms.insert.insert` adds to a linear operation."""

LINEAR_TYPES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

_NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Identity,
)


def _all_forms(*names: str) -> frozenset[Any]:
    """Every function of torch, torch.nn.functional and Tensor under these names."""
    places = (torch, F, Tensor, torch._C._nn)
    return frozenset(
        getattr(place, form)
        for name in names
        for form in (name, f"{name}_")
        for place in places
        if hasattr(place, form)
    )


_NONLINEAR = _all_forms(
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "sigmoid", "logsigmoid", "tanh", "softplus", "softsign", "hardtanh", "hardsigmoid", "hardswish",
    "clamp", "clamp_min", "maximum", "softmax", "log_softmax",
)  # fmt: skip

# A normalised value is still normalised (or a sum of normalised values) behind these.
_TRANSPARENT = _all_forms(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "dropout", "alpha_dropout", "feature_dropout",
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "permute", "transpose", "contiguous",
    "add",
)  # fmt: skip


@dataclass(frozen=True)
class Flow:
    """Where the output of one linear operation goes."""

    name: str
    module: nn.Module
    norm: str | None
    """Name of the normalisation (or identity) that takes the output directly."""
    nonlinear: bool
    """Whether the output reaches a nonlinearity with only pooling, sums and views between."""
    calls: int
    """How often the forward pass uses the module; more than once: it is shared."""


class _Consumers(TorchFunctionMode):
    """Follows tagged tensors through functions."""

    def __init__(self, tags: dict[int, frozenset[str]]) -> None:
        super().__init__()
        self.tags = tags
        self.nonlinear: set[str] = set()
        self.alive: list[Any] = []  # an id is only unique while its tensor lives

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inputs = [value for value in args if isinstance(value, Tensor)]
        found = frozenset[str]().union(*(self.tags.get(id(value), frozenset()) for value in inputs))
        result = func(*args, **(kwargs or {}))
        if found and func in _NONLINEAR:
            self.nonlinear |= found
        elif found and func in _TRANSPARENT and isinstance(result, Tensor):
            self.tags[id(result)] = found
            self.alive.append(result)
        return result


class preserved:
    """Leave a module's modes, buffers and torch's random state as they were, whatever happens."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        """Take the snapshot."""
        self._random = torch.get_rng_state()
        self._modes = [(module, module.training) for module in self._model.modules()]
        # By owner and name: some modules replace a buffer instead of writing to it.
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def __exit__(self, *error: object) -> None:
        """Put everything back."""
        for module, training in self._modes:
            module.training = training
        with torch.no_grad():
            for owner, name, buffer, value in self._buffers:
                owner._buffers[name] = buffer.copy_(value)
        torch.set_rng_state(self._random)


def trace(model: nn.Module, *example: Any, **named: Any) -> list[Flow]:
    """Run the network on an example in evaluation mode; say where each linear operation leads.

    Returns one entry for each convolution and fully connected layer that ran, in the order of
    their first call. The model is left as it was.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, int] = {}
    norms: dict[str, str] = {}
    tags: dict[int, frozenset[str]] = {}
    direct: dict[int, str] = {}
    consumers = _Consumers(tags)

    def after_linear(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if hasattr(module, INSERTED):
            norms[names[module]] = f"{names[module]}.{INSERTED}"
        tags[id(output)] = frozenset({names[module]})
        direct[id(output)] = names[module]
        consumers.alive.append(output)

    def before_norm(module: nn.Module, inputs: Any) -> None:
        source = direct.get(id(inputs[0])) if inputs else None
        if source is not None:
            norms.setdefault(source, names[module])

    def after_norm(module: nn.Module, inputs: Any, output: Any) -> None:
        found = tags.get(id(inputs[0])) if inputs else None
        if found and isinstance(output, Tensor):
            tags[id(output)] = found
            consumers.alive.append(output)

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        for module in names:
            if isinstance(module, LINEAR_TYPES):
                handle = module.register_forward_hook(after_linear)
                stack.callback(handle.remove)
            elif isinstance(module, _NORM_TYPES):
                stack.callback(module.register_forward_pre_hook(before_norm).remove)
                stack.callback(module.register_forward_hook(after_norm).remove)
        model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(consumers)
        model(*example, **named)

    return [
        Flow(names[m], m, norms.get(names[m]), names[m] in consumers.nonlinear, count)
        for m, count in calls.items()
    ]
