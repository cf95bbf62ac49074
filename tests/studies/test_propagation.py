"""Gradients by layer, against the closed forms of one layer and of many wide ones."""

import numpy as np
import pytest
import torch
from tests.tolerances import DOUBLE, FINITE_WIDTH

from batchnorm.studies.propagation import gradient_norms


def test_one_layer_is_that_of_the_papers_closed_form() -> None:
    m, width = 16, 5
    torch.manual_seed(2)
    x, w, g = (
        torch.randn(*s, dtype=torch.float64) for s in ((m, width), (width, width), (m, width))
    )
    y = (x @ w / width**0.5).numpy()
    sigma = np.sqrt(y.var(0) + 1e-5)
    hat = (y - y.mean(0)) / sigma
    dz = g.numpy() * (1 - np.tanh(hat) ** 2)
    dy = (m * dz - dz.sum(0) - hat * (dz * hat).sum(0)) / (m * sigma)  # [P1] Section 3
    expected = [np.linalg.norm(dy @ w.numpy().T) / width**0.5, np.linalg.norm(g)]
    torch.manual_seed(2)
    found = gradient_norms("tanh", "batch", layers=1, width=width, batch=m)
    assert found == pytest.approx(expected, rel=DOUBLE)


@pytest.mark.parametrize(
    ("activation", "norm", "factor"),
    [("relu", "none", 1 / 2), ("relu", "batch", np.pi / (np.pi - 1))],
)
def test_the_factor_of_wide_layers(activation: str, norm: str, factor: float) -> None:
    torch.manual_seed(0)
    norms = np.array(gradient_norms(activation, norm, layers=12, width=300, batch=150))[1:]
    assert ((norms[:-1] / norms[1:]) ** 2).mean() == pytest.approx(factor, rel=FINITE_WIDTH)


def test_a_sigmoid_takes_at_least_fifteen_sixteenths_of_the_square() -> None:
    torch.manual_seed(0)
    norms = np.array(gradient_norms("sigmoid", "none", layers=8, width=300, batch=100))[1:]
    assert ((norms[:-1] / norms[1:]) ** 2).mean() < (1 + FINITE_WIDTH) / 16  # (σ′)² ≤ 1/16


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(KeyError, match="swish"):
        gradient_norms("swish", "none", layers=1, width=2, batch=3)
