"""A layer with the arrays of Keras or Flax does what theirs does, in evaluation and in training."""

import copy

import numpy as np
import pytest
import torch
from tests import tolerances
from torch import nn

import batchnorm
from batchnorm.transforms.import_statistics import import_statistics

GENERATOR = np.random.default_rng(0)
GAMMA, BETA, MEAN = GENERATOR.normal(size=(3, 4))
VAR = GENERATOR.uniform(0.5, 2, size=4)
X = GENERATOR.normal(size=(8, 4))
ARRAYS = {
    "keras": {"gamma": GAMMA, "beta": BETA, "moving_mean": MEAN, "moving_variance": VAR},
    "flax": {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR},
}


@pytest.mark.parametrize(("convention", "eps"), [("keras", 1e-3), ("flax", 1e-5)])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_evaluation_and_a_step_of_training(convention, eps, kind):
    model = nn.Sequential(nn.Identity(), kind(4)).double()
    import_statistics(model, {"1": ARRAYS[convention]}, convention=convention, momentum=0.8)
    expected = GAMMA * (X - MEAN) / np.sqrt(VAR + eps) + BETA
    np.testing.assert_allclose(
        model.eval()(torch.tensor(X)).detach(), expected, rtol=tolerances.DOUBLE
    )
    model.train()(torch.tensor(X))
    np.testing.assert_allclose(
        model[1].running_mean, 0.8 * MEAN + 0.2 * X.mean(0), rtol=tolerances.DOUBLE
    )


def test_the_variance_that_training_here_would_have_tracked():
    layer = batchnorm.BatchNorm1d(4).double()
    import_statistics(
        layer, {"": ARRAYS["flax"] | {"var": X.var(0)}}, convention="flax", values=len(X)
    )
    np.testing.assert_allclose(layer.running_var, X.var(0, ddof=1), rtol=tolerances.DOUBLE)


def test_without_scale_and_center():
    layer = batchnorm.BatchNorm1d(4)
    nn.init.normal_(layer.weight)
    import_statistics(layer, {"": {"mean": MEAN, "var": VAR}}, convention="flax", eps=1e-2)
    assert layer.weight.tolist() == [1] * 4
    assert layer.bias.tolist() == [0] * 4
    assert layer.eps == 1e-2
    assert layer.momentum == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"2": {}}, {}, "'2' is no batch norm; there are 0, 1"),
        ({"1": {"gama": GAMMA}}, {}, "1: gama is none of gamma, beta"),
        ({"1": {"moving_mean": MEAN}}, {}, "1: moving_variance is missing"),
        ({"1": ARRAYS["keras"] | {"gamma": GAMMA[:2]}}, {}, r"gamma has shape \(2,\), weight \(4,"),
        ({"1": ARRAYS["keras"] | {"moving_variance": -VAR}}, {}, "moving_variance is not finite"),
        ({"1": ARRAYS["keras"]}, {"convention": "caffe"}, "one of keras, flax, got 'caffe'"),
        ({"1": ARRAYS["keras"]}, {"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"1": ARRAYS["keras"]}, {"values": 1}, "values must be 2 or more"),
    ],
    ids=range(8),
)
def test_what_does_not_fit_changes_nothing(source, options, message):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        import_statistics(
            model, {"0": ARRAYS["keras"]} | source, **{"convention": "keras"} | options
        )
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert model[0].momentum == 0.1
    with pytest.raises(ValueError, match="1 has no weight to hold gamma"):
        import_statistics(
            nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, affine=False)),
            {"1": ARRAYS["keras"]},
            convention="keras",
        )
