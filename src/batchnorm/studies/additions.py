"""What [P1] Section 4.2.1 takes out of a network: dropout and local response normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.studies.settings import CellSettings, SettingsError

__all__ = ["add_layers"]

_DENSE = ("mlp", "linear")
"""Networks without convolutions."""

_NEIGHBOURS = 5
"""Channels over which a response is normalised; α, β and k are torch's defaults."""


class _LocalResponseNorm(nn.LocalResponseNorm):
    """As torch's, in a third of the time: its sum over neighbours is a product with a matrix."""

    def forward(self, input: Tensor) -> Tensor:
        channel = torch.arange(input.shape[1], device=input.device)
        near = (channel - channel[:, None]).abs() <= self.size // 2  # the size is odd here
        weight = near.to(input.dtype)[:, :, None, None] / self.size
        means = functional.conv2d(input.square(), weight)
        return input / (self.k + self.alpha * means) ** self.beta


def add_layers(model: nn.Module, settings: CellSettings) -> None:
    """Give a built-in network the layers that ``lrn`` and ``dropout`` ask for.

    They have no parameters, and those of the network keep their names.

    Raises:
        SettingsError: the network has no convolutions, or no activations, to normalise behind.
    """
    dense = settings.model in _DENSE
    activations = [name for name, _ in model.named_modules() if name.endswith("activation")]
    if settings.lrn:
        if dense:
            raise SettingsError(
                f"lrn=True: model={settings.model!r} has no channels whose neighbours could be "
                "normalised together. Choose model cnn, vgg or resnet, or leave it out."
            )
        responses = [
            name for name in activations if not isinstance(model.get_submodule(name), nn.Identity)
        ]
        if not responses:
            raise SettingsError(
                f"lrn=True: with activation={settings.activation!r} there are no responses to "
                "normalise. Choose relu or another activation, or leave it out."
            )
        for name in responses:
            _put_behind(model, name, _LocalResponseNorm(_NEIGHBOURS))
    if settings.dropout:
        for name in activations if dense else ("flatten",):  # "flatten" is before the output
            _put_behind(model, name, nn.Dropout(settings.dropout))


def _put_behind(model: nn.Module, name: str, layer: nn.Module) -> None:
    model.set_submodule(name, nn.Sequential(model.get_submodule(name), layer))
