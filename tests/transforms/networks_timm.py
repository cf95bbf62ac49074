"""Real architectures: timm's, without weights, with statistics that are none of them trivial."""

from functools import cache
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


@cache
def timm() -> ModuleType:
    """Import timm, or skip with the reason.

    It imports torchvision, whose compiled part is built for PyPI's torch and does not load beside
    a CPU build of the same version. The rest only wants two of its operators to be defined.
    """
    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            name = schema.partition("(")[0]
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)
        _LIBRARIES.append(library)
    try:
        import timm.optim
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


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
