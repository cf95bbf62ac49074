"""Every verb on real architectures, against what timm or torch itself does."""

import copy
from functools import cache

import pytest
import torch
from tests import tolerances
from tests.transforms.networks_timm import ARCHITECTURES, images, network, timm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm.transforms.freeze import freeze, frozen
from batchnorm.transforms.layers import batch_norms
from batchnorm.transforms.parameter_groups import parameter_groups


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small images: two threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WITH_BATCH_NORM = ARCHITECTURES[:-1]
# Batch norms that fold, and those that stand before an activation or a padded convolution.
FOLDS = {
    "resnet50": (53, 0),
    "resnetv2_50": (32, 17),
    "mobilenetv3_large_100": (46, 0),
    "efficientnet_b0": (49, 0),
    "densenet121": (59, 62),
    "regnety_008": (47, 0),
}


@cache
def _original(architecture):
    return network(architecture).double()


@pytest.fixture(params=WITH_BATCH_NORM)
def architecture(request):
    return request.param


@pytest.fixture
def model(architecture):
    return copy.deepcopy(_original(architecture))


X = images(2, seed=1).double()
OTHER = images(2, seed=2).double()


def run(model, x=OTHER):
    with torch.no_grad():
        return model(x)


def assert_same(found, expected):
    assert (found - expected).abs().max() <= tolerances.DOUBLE * expected.abs().max()


def test_fold(architecture, model):
    before = run(model)
    report = batchnorm.fold(model, X)
    assert (len(report.folded), len(report.left)) == FOLDS[architecture]
    assert all("is not the output of a linear operation" in why for why in report.left.values())
    assert max(report.differences.values()) < tolerances.DOUBLE
    assert_same(run(model), before)
    assert len([m for m in model.modules() if isinstance(m, _BatchNorm)]) == len(report.left)


def test_convert_and_revert(architecture, model):
    """Exactly torch's layers change; what normalises and activates in a class of its own stays."""
    before = run(model)
    kinds = {name: type(layer) for name, layer in batch_norms(model).items()}
    batchnorm.convert(model)
    converted = {n for n, layer in batch_norms(model).items() if type(layer) is not kinds[n]}
    assert converted == {name for name, kind in kinds.items() if kind is nn.BatchNorm2d}
    assert_same(run(model), before)
    batchnorm.revert(model)
    assert kinds == {name: type(layer) for name, layer in batch_norms(model).items()}
    assert torch.equal(run(model), before)


def test_recalibrate_is_what_training_with_momentum_1_tracks(model):
    """On one batch the moments are that batch's, by torch's own tracking."""
    x = images(8).double()
    by_torch = copy.deepcopy(model).train()
    for layer in batch_norms(by_torch).values():
        layer.momentum = 1.0
    run(by_torch, x)
    report = batchnorm.recalibrate(model, [x])
    assert report.left == {}
    theirs = dict(by_torch.named_buffers())
    for name, value in model.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(
                value, theirs[name], rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE
            )


def test_strip_bias(model):
    """Biases that are there for the test go again, each before its batch norm.

    They are small: the statistics know nothing of them, and large ones grow from layer to layer
    until rounding does as well.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    generator = torch.Generator().manual_seed(3)
    for conv in convolutions:
        bias = torch.randn(conv.out_channels, generator=generator, dtype=torch.float64)
        conv.bias = nn.Parameter(0.1 * bias)
    before = run(model)
    report = batchnorm.strip_bias(model, X)
    assert_same(run(model), before)
    assert len(report.stripped) + len(report.left) == len(batch_norms(model))
    assert sum(conv.bias is None for conv in convolutions) == len(report.stripped) > 30


@pytest.mark.parametrize("name", ["resnet50", "regnety_008"])
def test_zero_gamma_finds_what_timm_zeroes_by_name(name):
    model = timm().create_model(name)
    theirs = {n for n, layer in batch_norms(model).items() if not layer.weight.any()}
    for layer in batch_norms(model).values():
        nn.init.ones_(layer.weight)
    report = batchnorm.zero_gamma(model, X.float())
    assert set(report.zeroed) == theirs
    assert report.left == {}
    assert theirs == {n for n, layer in batch_norms(model).items() if not layer.weight.any()}


def test_zero_gamma_leaves_blocks_that_end_otherwise():
    report = batchnorm.zero_gamma(copy.deepcopy(_original("resnetv2_50")), X)
    assert (report.zeroed, len(report.left)) == ([], 16)
    assert set(report.left.values()) == {"the block does not end in a batch norm"}
    with pytest.raises(ValueError, match="it has no residual blocks"):
        batchnorm.zero_gamma(copy.deepcopy(_original("densenet121")), X)


@pytest.mark.parametrize("architecture", ["resnet50", "regnety_008"], indirect=True)
def test_freeze(model):
    before = {name: value.clone() for name, value in model.named_buffers()}
    evaluated = run(model)
    names = freeze(model)
    assert set(frozen(model)) == set(names) == set(batch_norms(model))
    model.train()(X).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    for layer in batch_norms(model).values():
        assert layer.weight.grad is None
        assert layer.bias.grad is None
    assert sum(p.grad is not None for p in model.parameters()) > 30
    assert_same(run(model.eval()), evaluated)


def test_parameter_groups_are_timms(model):
    ours = parameter_groups(model, 0.1)
    theirs = timm().optim.param_groups_weight_decay(model, 0.1)
    for decay in (0.0, 0.1):
        mine, other = (
            {id(p) for group in groups if group["weight_decay"] == decay for p in group["params"]}
            for groups in (ours, theirs)
        )
        assert mine == other


@pytest.mark.parametrize("architecture", ["resnet50", "densenet121"], indirect=True)
def test_replace(architecture, model):
    done = batchnorm.replace(model, "group", X)
    assert len(done.changes) == sum(FOLDS[architecture])
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    torch.testing.assert_close(run(model)[:1], run(model, OTHER[:1]))  # no sample sees another
    done.undo()
    assert torch.equal(run(model), run(_original(architecture)))


VERBS = {
    "fold": lambda m: batchnorm.fold(m, X.float()),
    "recalibrate": lambda m: batchnorm.recalibrate(m, [X.float()]),
    "strip_bias": lambda m: batchnorm.strip_bias(m, X.float()),
    "zero_gamma": lambda m: batchnorm.zero_gamma(m, X.float()),
    "freeze": batchnorm.freeze,
    "adapt": lambda m: batchnorm.adapt(m, [X.float()]),
    "replace": lambda m: batchnorm.replace(m, "group", X.float()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_network_without_batch_norm_says_so(verb):
    model = _convnext()
    before = run(model, X.float())
    with pytest.raises(
        ValueError, match=r"ConvNeXt has no batch norm; it has LayerNorm.*nothing to do"
    ):
        VERBS[verb](model)
    assert torch.equal(run(model, X.float()), before)


@cache
def _convnext():
    return timm().create_model("convnext_tiny", depths=(1, 1, 1, 1)).eval()
