"""Networks to study: small built-in ones that take ``norm=``, and the user's own."""

from __future__ import annotations

import copy
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.nn.norms import NORMS, make_norm, makes_bias_redundant
from batchnorm.nn.weight_standardization import StandardizedConv2d, StandardizedLinear
from batchnorm.studies.additions import add_layers
from batchnorm.studies.calibration import measure_frozen
from batchnorm.studies.callables import CallableError, is_callable_name, load_callable
from batchnorm.studies.placement import place_norms
from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.studies.tasks import Task
from batchnorm.studies.unknown import unknown
from batchnorm.transforms.dataflow import LINEAR_TYPES, preserved
from batchnorm.transforms.insert import insert
from batchnorm.transforms.replace import replace

__all__ = ["MODELS", "Arm", "build_arm", "called"]

Shape = tuple[int, ...]
_Parts = dict[str, nn.Module]  # named modules, one after the other

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


WEIGHT = "weight"
"""The arm that standardises weights: a kind of linear operation, not a layer behind it."""


def _norm(norm: str, channels: int, rank: int) -> nn.Module:
    return make_norm("none" if norm == WEIGHT else norm, channels, rank)


def _dense(
    name: str, inputs: int, outputs: int, norm: str, activation: str, bias: bool = True
) -> _Parts:
    """Z = g(BN(Wu)): the bias is left to β ([P1] Section 3.2)."""
    layer = StandardizedLinear if norm == WEIGHT else nn.Linear
    return {
        name: layer(inputs, outputs, bias=bias and not makes_bias_redundant(norm)),
        f"{name}_norm": _norm(norm, outputs, 0),
        f"{name}_activation": _ACTIVATIONS[activation](),
    }


def _conv(
    name: str, inputs: int, outputs: int, norm: str, activation: str, stride: int = 1
) -> _Parts:
    layer, bias = (
        StandardizedConv2d if norm == WEIGHT else nn.Conv2d,
        not makes_bias_redundant(norm),
    )
    return {
        name: layer(inputs, outputs, 3, stride, padding=1, bias=bias),
        f"{name}_norm": _norm(norm, outputs, 2),
        f"{name}_activation": _ACTIVATIONS[activation](),
    }


def _classifier(channels: int, outputs: int) -> _Parts:
    return {
        "mean": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "output": nn.Linear(channels, outputs),
    }


def _image(name: str, shape: Shape, smallest: int) -> int:
    """Channels of the input, if it is an image of at least ``smallest`` × ``smallest``."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise SettingsError(
            f"model={name!r} takes images of at least {smallest}×{smallest}, and the task gives "
            f"inputs of shape {'×'.join(map(str, shape))}. Choose model mlp or cnn, or other data."
        )
    return shape[0]


def mlp(
    shape: Shape,
    outputs: int,
    norm: str,
    depth: int | None = None,
    width: int | None = None,
    activation: str | None = None,
) -> nn.Module:
    """Fully connected: by default three layers of 100 sigmoid units, as in [P1] Section 4.1."""
    parts: _Parts = {"flatten": nn.Flatten()}
    units = math.prod(shape)
    for layer in range(1, (depth or 3) + 1):
        size = width or 100
        parts |= _dense(f"hidden{layer}", units, size, norm, activation or "sigmoid")
        units = size
    return nn.Sequential(OrderedDict(**parts, output=nn.Linear(units, outputs)))


def linear(
    shape: Shape,
    outputs: int,
    norm: str,
    depth: int | None = None,
    width: int | None = None,
    activation: str | None = None,
) -> nn.Module:
    """Deep linear network W₁…W_k x, by default k = 25 ([P2] Section 3); W₁ gives the output."""
    parts: _Parts = {"flatten": nn.Flatten()}
    units, size = math.prod(shape), width or outputs
    for layer in range(1, depth or 25):
        name = f"hidden{layer}"
        parts |= _dense(name, units, size, norm, activation or "identity", bias=False)
        units = size
    last = StandardizedLinear if norm == WEIGHT else nn.Linear
    return nn.Sequential(OrderedDict(**parts, output=last(units, outputs, bias=False)))


def cnn(
    shape: Shape,
    outputs: int,
    norm: str,
    depth: int | None = None,
    width: int | None = None,
    activation: str | None = None,
) -> nn.Module:
    """Plain convolutions: by default four, every second of which halves the image."""
    channels, width, activation = _image("cnn", shape, 4), width or 16, activation or "relu"
    parts: _Parts = {}
    for layer in range(depth or 4):
        stride = 2 if layer % 2 and min(shape[1:]) >> (layer // 2) > 2 else 1
        parts |= _conv(f"conv{layer + 1}", channels, width, norm, activation, stride)
        channels = width
    return nn.Sequential(OrderedDict(parts | _classifier(channels, outputs)))


_VGG = {13: (2, 2, 3, 3, 3), 16: (2, 2, 4, 4, 4)}  # convolutions before each halving: VGG-D, VGG-E


def vgg(
    shape: Shape,
    outputs: int,
    norm: str,
    depth: int | None = None,
    width: int | None = None,
    activation: str | None = None,
) -> nn.Module:
    """VGG for 32×32: 13 convolutions (VGG-D) or 16 (VGG-E) and one classifier layer.

    [P2] names layers up to 13 in its figures, so its "VGG-like" network had at least so many.
    """
    channels, width, activation = _image("vgg", shape, 32), width or 64, activation or "relu"
    if (depth or 13) not in _VGG:
        raise SettingsError(f"depth={depth} is not a depth of vgg: choose 13 or 16 convolutions.")
    parts: _Parts = {}
    layer = 0
    for stage, convolutions in enumerate(_VGG[depth or 13]):
        size = width * min(2**stage, 8)
        for _ in range(convolutions):
            layer += 1
            parts |= _conv(f"conv{layer}", channels, size, norm, activation)
            channels = size
        parts[f"pool{stage + 1}"] = nn.MaxPool2d(2)
    return nn.Sequential(OrderedDict(parts | _classifier(channels, outputs)))


class _ResidualBlock(nn.Module):
    """y = g(BN(W₂ g(BN(W₁u))) + shortcut(u)) (arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, norm: str, activation: str, stride: int) -> None:
        super().__init__()
        shortcut: _Parts = {}
        layer = StandardizedConv2d if norm == WEIGHT else nn.Conv2d
        if stride != 1 or inputs != outputs:
            shortcut = {
                "conv": layer(inputs, outputs, 1, stride, bias=not makes_bias_redundant(norm)),
                "norm": _norm(norm, outputs, 2),
            }
        convolutions = _conv("conv1", inputs, outputs, norm, activation, stride)
        convolutions |= _conv("conv2", outputs, outputs, norm, "identity")
        self.residual = nn.Sequential(OrderedDict(convolutions))
        self.shortcut = nn.Sequential(OrderedDict(shortcut))
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return result


def resnet(
    shape: Shape,
    outputs: int,
    norm: str,
    depth: int | None = None,
    width: int | None = None,
    activation: str | None = None,
) -> nn.Module:
    """ResNet for small images: three stages of ``depth`` blocks, 3 by default (ResNet-20)."""
    channels, width, activation = _image("resnet", shape, 8), width or 16, activation or "relu"
    parts = _conv("stem", channels, width, norm, activation)
    channels = width
    for stage in range(3):
        for block in range(depth or 3):
            size, stride = width << stage, 2 if stage and not block else 1
            name = f"stage{stage + 1}block{block + 1}"
            parts[name] = _ResidualBlock(channels, size, norm, activation, stride)
            channels = size
    return nn.Sequential(OrderedDict(parts | _classifier(channels, outputs)))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg": vgg,
    "resnet": resnet,
    "linear": linear,
}
"""Name → factory of (shape, outputs, norm, depth, width, activation). Studies add theirs."""


@dataclass(frozen=True)
class Arm:
    """A network ready to train, and what was done to the user's own to get there."""

    model: nn.Module
    changes: list[str]


@torch.no_grad()
def _initialize(model: nn.Module, scale: float, std: float | None) -> None:
    """Weights of Glorot's (or of standard deviation ``std``) times ``scale``, biases zero."""
    for module in model.modules():
        if isinstance(module, LINEAR_TYPES):
            if std is None:
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.normal_(module.weight, std=std)
            module.weight *= scale
            if module.bias is not None:
                module.bias.zero_()


def _built_in(settings: CellSettings, task: Task) -> Arm:
    factory = MODELS[settings.model]
    options = {
        "depth": settings.depth,
        "width": settings.width,
        "activation": settings.activation,
    }
    model = place_norms(factory(task.shape, task.outputs, settings.norm, **options), settings)
    # Building drew numbers for biases that only some arms have; only the weights of linear
    # operations are drawn from here on, and every arm has the same of them.
    torch.manual_seed(settings.seed)
    _initialize(model, settings.init_scale, settings.init_std)
    add_layers(model, settings)
    # On a CPU a step takes a fifth to a third less time in this layout.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stubs
    return Arm(model, [])


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@torch.no_grad()
def _copy_shared(source: nn.Module, target: nn.Module) -> int:
    """Copy the parameters whose names and shapes agree; return how many did."""
    values = dict(source.named_parameters())
    shared = {
        name: parameter
        for name, parameter in target.named_parameters()
        if name in values and values[name].shape == parameter.shape
    }
    for name, parameter in shared.items():
        parameter.copy_(values[name])
    return len(shared)


def called(name: str, **arguments: str) -> nn.Module:
    """Make the network of a ``module:callable``.

    Raises:
        CallableError: it cannot be found, failed, or returned something else.
    """
    make = load_callable("model", name)
    try:
        model = make(**arguments)
    except Exception as error:
        raise CallableError(
            f"model={name!r} raised {type(error).__name__}: {error}. "
            "It is called without arguments (or with norm=, if it takes that)."
        ) from error
    if not isinstance(model, nn.Module):
        raise CallableError(
            f"model={name!r} returned a {type(model).__name__}, not a torch.nn.Module."
        )
    return copy.deepcopy(model)  # a callable may hand out the same network each time


def _check_fits(name: str, model: nn.Module, task: Task) -> None:
    example = task.train.x[:2]
    try:
        with torch.no_grad(), preserved(model):
            output = model.eval()(example)
    except Exception as error:
        raise CallableError(
            f"model={name!r} fails on a batch of shape {tuple(example.shape)} "
            f"({type(error).__name__}: {error}). Choose a task whose inputs it takes."
        ) from error
    if not isinstance(output, Tensor) or output.shape != (2, task.outputs):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CallableError(
            f"model={name!r} gives {got} for 2 examples of task {task.name!r}, "
            f"which needs a tensor of shape (2, {task.outputs})."
        )


def _own(settings: CellSettings, task: Task) -> Arm:
    name, norm = settings.model, settings.norm
    for option in ("depth", "width", "activation", "init_std", "dropout", "lrn", "placement"):
        if getattr(settings, option) is not None:
            raise SettingsError(
                f"{option}={getattr(settings, option)!r} is for the built-in networks; "
                f"model={name!r} decides that itself. Leave it out."
            )
    takes_norm = "norm" in inspect.signature(load_callable("model", name)).parameters
    if norm == WEIGHT and not takes_norm:
        raise SettingsError(
            f"norm={norm!r} changes the linear operations themselves, which model={name!r} makes. "
            "Give it an argument norm= that decides, or leave this norm out."
        )
    model = called(name, norm=norm) if takes_norm else called(name)
    _check_fits(name, model, task)
    example, changes = task.train.x[:2], []
    try:
        if takes_norm:
            torch.manual_seed(settings.seed)
            copied = _copy_shared(called(name, norm="none"), model)
            changes.append(
                f"built by {name} with norm={norm!r}; "
                f"{copied} parameters start as in the network with norm='none'"
            )
        elif _has_batch_norm(model):
            changes = [] if norm == "batch" else replace(model, norm, example).changes
        else:
            changes = [] if norm == "none" else insert(model, norm, example)
    except ValueError as error:
        raise SettingsError(f"model={name!r}, norm={norm!r}: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(settings.init_scale)
    return Arm(model, changes)


def build_arm(settings: CellSettings, task: Task) -> Arm:
    """Build the network of one cell.

    Arms of one seed start from the same weights wherever names and shapes agree.

    Raises:
        SettingsError: model or norm is unknown, or does not fit the task.
        CallableError: the user's callable failed or returned something else.
    """
    if settings.norm not in (known := [*NORMS, WEIGHT]):
        raise SettingsError(unknown("norm", settings.norm, known))
    torch.manual_seed(settings.seed)
    if settings.model in MODELS:
        arm = _built_in(settings, task)
    elif is_callable_name(settings.model):
        arm = _own(settings, task)
    else:
        raise SettingsError(
            unknown("model", settings.model, MODELS)
            + " Your own network is given as module:callable."
        )
    if settings.norm == "frozen":
        measure_frozen(arm.model, task.train)
    return arm
