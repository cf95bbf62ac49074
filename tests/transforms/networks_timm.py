"""Real architectures: timm's, without weights, with statistics that are none of them trivial."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ARCHITECTURES = (
    "resnet50",
    "resnetv2_50",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "densenet121",
    "regnety_008",
    "convnext_tiny",
)
"""The last has no batch norm."""

SIZE = 32
"""Pixels of an image, each way: a batch shows the deepest layers one pixel each."""

# Kept alive: a library's operators go when it does.
_LIBRARIES = []


def timm() -> ModuleType:
    """Import timm, or skip with the reason.

    It imports torchvision, whose compiled part is built for PyPI's torch and does not load beside
    a CPU build of the same version. The rest only wants two of its operators to be defined.
    """
    try:
        _import_torchvision()
        import timm.optim
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


def _import_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


def network(architecture: str, seed: int = 0) -> nn.Module:
    """Make a network in evaluation mode whose activations keep their size from layer to layer.

    Statistics are those of a batch of noise, put off by a tenth or so, so that normalising with
    them is not what normalising by the batch would be; γ and β are random.
    """
    torch.manual_seed(seed)
    model = timm().create_model(architecture, num_classes=10)
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        layer.momentum = 1.0
        nn.init.uniform_(layer.weight, 0.7, 1.3)
        nn.init.normal_(layer.bias, 0, 0.2)
    with torch.no_grad():
        model.train()(images(16))
    for layer in layers:
        layer.momentum = 0.1
        layer.running_mean += 0.1 * layer.running_var.sqrt() * torch.randn(layer.num_features)
        layer.running_var *= torch.empty(layer.num_features).uniform_(0.8, 1.25)
    return model.eval()


def images(n: int, seed: int = 1) -> Tensor:
    """Noise of the shape of images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, SIZE, SIZE, generator=generator)
