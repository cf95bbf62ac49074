"""Moments of distributions whose moments are known."""

import math

import pytest
import torch
from tests.tolerances import DOUBLE
from torch import nn

from batchnorm.probes import find_layers, observe
from batchnorm.probes.shape import Shape, moments
from batchnorm.probes.step import Step


def test_moments_of_a_bernoulli_unit() -> None:
    # P(1) = p: skewness (1 − 2p)/√(pq), excess kurtosis (1 − 6pq)/(pq), whatever scale and offset.
    rows = []
    for ones in (1, 4):
        rows.append([7.0 - 3.0 * (i < ones) for i in range(16)])
    values = torch.tensor([*rows, [5.0] * 16]).T  # the last unit does not vary
    expected_skewness, expected_kurtosis = 0.0, 0.0
    for p in (1 / 16, 4 / 16):
        pq = p * (1 - p)
        expected_skewness += abs(1 - 2 * p) / math.sqrt(pq) / 2
        expected_kurtosis += abs(1 - 6 * pq) / pq / 2
    assert moments(values) == pytest.approx((expected_skewness, expected_kurtosis), rel=DOUBLE)
    # Positions of an image count as examples.
    images = values.reshape(4, 2, 2, 3).permute(0, 3, 1, 2)
    assert moments(images) == pytest.approx(moments(values), rel=DOUBLE)
    assert all(math.isnan(value) for value in moments(values[:, 2:]))


def test_the_probe_tells_input_and_output_apart() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[2].weight.fill_(1.0)
        model[2].bias.fill_(1.0)
    x = torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]])
    layers = find_layers(model, x)
    probe = Shape(every=1)
    with observe(probe.modules(model, layers)) as seen:
        model(x)
    step = Step(0, model, layers, x, x, lambda o, t: o.sum(), 0.1, torch.get_rng_state(), seen=seen)
    found = {(r.layer, r.quantity): r.value for r in probe.before_update(step)}
    # Before ReLU and behind it the values are two, a quarter of them the larger one.
    for layer in ("0", "2"):
        for side in ("input", "output"):
            assert found[layer, f"shape/{side}_skewness"] == pytest.approx(1 / math.sqrt(0.75))
    assert found["0", "shape/output_zeros"] == 0
    assert found["2", "shape/input_zeros"] == 0.75
    assert found["2", "shape/output_zeros"] == 0
