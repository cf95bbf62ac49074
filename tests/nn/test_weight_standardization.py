"""Standardised weights against the formula, a row at a time."""

import numpy as np
import pytest
import torch
from tests import tolerances
from torch import nn

from batchnorm.nn.weight_standardization import StandardizedConv2d, StandardizedLinear


def standardized(weight: np.ndarray, gain: np.ndarray) -> np.ndarray:
    rows = []
    for row, factor in zip(weight.astype(np.float64), gain.astype(np.float64), strict=True):
        centred = row - row.mean()
        rows.append(factor * centred / np.sqrt(((centred**2).mean() + 1e-5) * row.size))
    return np.stack(rows)


@pytest.mark.parametrize(
    "layer", [StandardizedLinear(7, 5), StandardizedConv2d(3, 4, 3, padding=1)]
)
def test_against_the_formula(layer: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_(1.0, 2.0)
        layer.gain.uniform_(0.5, 2.0)
    x = torch.randn(2, 7) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 5, 5)
    weight = torch.from_numpy(
        standardized(layer.weight.detach().numpy(), layer.gain.detach().numpy())
    )
    if isinstance(layer, nn.Linear):
        expected = x.double() @ weight.T + layer.bias
    else:
        expected = nn.functional.conv2d(x.double(), weight, layer.bias.double(), padding=1)
    found = layer(x).detach().double()
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=tolerances.SINGLE)


def test_scale_and_offset_of_the_weights_do_not_matter() -> None:
    torch.manual_seed(0)
    layer, x = StandardizedLinear(50, 4), torch.randn(3, 50)
    with torch.no_grad():
        layer.weight.normal_(0.0, 1.0)
        before = layer(x)
        layer.weight.mul_(5).add_(3)
        torch.testing.assert_close(layer(x), before, rtol=0, atol=tolerances.DIFFERENT_EPSILON)
