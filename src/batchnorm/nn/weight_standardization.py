"""Linear operations whose weights are standardised, instead of what they give."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["StandardizedConv2d", "StandardizedLinear"]


def _standardized(weight: Tensor, gain: Tensor, eps: float) -> Tensor:
    r"""Each output's weights with mean 0 and a norm of its gain.

    .. math:: \hat W_{ij} = g_i\,\frac{W_{ij} - \mu_i}{\sqrt{N}\,\sigma_i}
    """
    fan_in = weight[0].numel()
    var, mean = torch.var_mean(weight, tuple(range(1, weight.dim())), correction=0, keepdim=True)
    scale = gain.reshape(mean.shape) * torch.rsqrt(var + eps) / math.sqrt(fan_in)
    return (weight - mean) * scale


class StandardizedLinear(nn.Linear):
    """A fully connected layer with scaled weight standardisation and a learned gain.

    References:
        Qiao et al. 2019, arXiv 1903.10520; the factor 1/√N and the gain, without which a network
        that has no other normalisation explodes: Brock et al. 2021, arXiv 2102.06171, Equation 1.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        """Gains start at 1."""
        super().__init__(in_features, out_features, bias)
        self.gain = nn.Parameter(torch.ones(out_features))

    def forward(self, input: Tensor) -> Tensor:
        """Return Ŵu + b."""
        return F.linear(input, _standardized(self.weight, self.gain, 1e-5), self.bias)


class StandardizedConv2d(nn.Conv2d):
    """A convolution with scaled weight standardisation and a learned gain.

    References:
        As :class:`StandardizedLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        """Gains start at 1."""
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.gain = nn.Parameter(torch.ones(out_channels))

    def forward(self, input: Tensor) -> Tensor:
        """Return Ŵ∗u + b."""
        weight = _standardized(self.weight, self.gain, 1e-5)
        result: Tensor = self._conv_forward(input, weight, self.bias)
        return result
