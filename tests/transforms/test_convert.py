"""There and back: the same network, the same numbers, the same objects."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn

import batchnorm
from batchnorm.transforms.convert import convert, revert


def network():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(4, momentum=None)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        shared,
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), shared),
        nn.Flatten(2),
        nn.BatchNorm1d(4, affine=False),
        nn.Unflatten(2, (5, 5, 1)),
        nn.BatchNorm3d(4, track_running_stats=False),
    )


def draw(seed=0):
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("training", [True, False])
def test_the_converted_network_computes_the_same(training):
    theirs, ours = network().train(training), convert(network().train(training))
    assert all(type(m).__module__ == "batchnorm.nn.batchnorm" for m in norms(ours))
    assert all(m.training == training for m in ours.modules())
    for seed in range(2):
        x = draw(seed)
        torch.testing.assert_close(
            step(ours, x), step(theirs, x), rtol=tolerances.SINGLE, atol=tolerances.SINGLE
        )
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_an_optimiser_goes_on():
    model = network()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    convert(model)
    before = copy.deepcopy(model.state_dict())
    step(model, draw())
    optimiser.step()
    assert not torch.equal(model[7].weight, before["7.weight"])


def test_the_layers_stay_the_same_objects():
    model = network()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    layers = list(model.modules())
    convert(model)
    assert all(a is b for a, b in zip(layers, model.modules(), strict=True))
    assert model[1] is model[3][1]
    model(draw())
    assert len(calls) == 2


def test_revert_is_the_opposite():
    model = network()
    text, before = repr(model), copy.deepcopy(model.state_dict())
    converted = convert(model)
    reverted = revert(converted)
    assert reverted is model
    assert repr(reverted) == text
    assert all(type(m) is getattr(nn, type(m).__name__) for m in norms(reverted))
    assert {frozenset(vars(m)) for m in norms(reverted)} == {
        frozenset(vars(m)) for m in norms(network())
    }
    for name, value in reverted.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_alone():
    layer = nn.BatchNorm2d(3)
    assert convert(layer) is layer
    assert type(layer) is batchnorm.BatchNorm2d


def test_half_networks_widen_and_narrow():
    model = convert(network().bfloat16())
    assert model[1].running_mean.dtype == torch.float32
    model(draw().bfloat16())
    revert(model)
    assert model[1].running_mean.dtype == torch.bfloat16
    model(draw().bfloat16())


def test_lazy_layers():
    model = convert(nn.Sequential(nn.LazyBatchNorm2d()))
    model(draw())
    assert type(model[0]) is batchnorm.BatchNorm2d
    assert model[0].num_features == 2


def test_subclasses_and_sync_are_left_alone():
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3))
    kinds = [type(m) for m in model]
    assert [type(m) for m in convert(model)] == kinds


@pytest.mark.parametrize(
    "options", [{"activation": "relu"}, {"statistics": batchnorm.Ghost(2)}], ids=str
)
def test_what_torch_cannot_do_is_not_reverted(options):
    model = nn.Sequential(batchnorm.BatchNorm2d(3), batchnorm.BatchNorm2d(3, **options))
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"1 has {name}=.*set it to None"):
        revert(model)
    assert all(type(m) is batchnorm.BatchNorm2d for m in model)
