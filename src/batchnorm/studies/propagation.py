"""How large the gradient is in each layer of a fully connected network at initialisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.nn.norms import make_norm

__all__ = ["gradient_norms"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def gradient_norms(
    activation: str, norm: str, *, layers: int, width: int, batch: int
) -> list[float]:
    """‖∂ℓ/∂h_l‖ for l = 0 … L: the batch of Gaussian inputs first, the output h_L last.

    h_l = g(N(W_l h_{l−1})) in float64, with weights of variance 1/width, which is Glorot's for
    square matrices, and a Gaussian ∂ℓ/∂h_L.

    Args:
        activation: g: sigmoid, tanh or relu.
        norm: N: a name of :data:`batchnorm.nn.norms.NORMS`.
        layers: L.
        width: units of each layer, inputs included.
        batch: examples.

    Raises:
        KeyError: the activation or the norm is unknown.
    """
    g = _ACTIVATIONS[activation]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    outputs = [normal(batch, width).requires_grad_()]
    for _ in range(layers):
        normalize = make_norm(norm, width, 0).double()
        outputs.append(g(normalize(outputs[-1] @ normal(width, width) / width**0.5)))
    gradients = torch.autograd.grad(outputs[-1], outputs, normal(batch, width))
    return [float(gradient.norm()) for gradient in gradients]
