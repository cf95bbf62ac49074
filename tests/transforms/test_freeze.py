"""Frozen stays frozen, whatever train() and an optimiser do; and thaws."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.transforms.freeze import freeze, frozen, unfreeze


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        batchnorm.BatchNorm1d(4, statistics=batchnorm.Ghost(4)),
        nn.Sequential(nn.Linear(4, 4), Activated(4)),
        nn.BatchNorm1d(4, affine=False),
    )


def train(model):
    """One step in training mode; return the names of what it changed."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(1))).pow(3).sum().backward()
    optimiser.step()
    return {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}


def names(layer, statistics, affine):
    found = [f"{layer}.{s}" for s in ("running_mean", "running_var", "num_batches_tracked")]
    return {*(found if statistics else ()), *([f"{layer}.weight", f"{layer}.bias"] * affine)}


ALL = {"1", "2", "3.1", "4"}


def test_frozen_layers_survive_train_and_only_they():
    model = network()
    assert freeze(model, "1", "3.*") == ["1", "3.1"]
    changed = train(model)
    assert not changed & (names("1", True, True) | names("3.1", True, True))
    assert changed >= names("2", True, True) | names("4", True, False)
    assert frozen(model) == dict.fromkeys(("1", "3.1"), ("statistics", "affine"))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_and_affine_are_frozen_separately(statistics, affine):
    model = network()
    freeze(model, statistics=statistics, affine=affine)
    changed = train(model)
    for layer in ALL:
        assert changed & names(layer, True, False) == names(layer, not statistics, False)
        if layer != "4":
            assert changed & names(layer, False, True) == names(layer, False, not affine)
    held = ("statistics",) * statistics + ("affine",) * affine
    expected = dict.fromkeys(ALL, held) | {"4": ("statistics",) * statistics}  # has no γ and β
    assert frozen(model) == {layer: what for layer, what in expected.items() if what}


def test_a_frozen_layer_computes_what_evaluation_computes():
    model = network()
    x = torch.randn(8, 3)
    train(model)
    freeze(model)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert model(x[:1]).shape == (1, 4)  # one sample is enough


def test_unfreeze_is_the_opposite():
    model = network()
    freeze(model)
    train(model)
    unfreeze(model)
    assert frozen(model) == {}
    assert all(m.training for m in model.modules())
    assert model[2].statistics == batchnorm.Ghost(4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert train(model) >= names("1", True, True) | names("2", True, True)
    model.eval()
    freeze(model)
    unfreeze(model)
    assert not any(m.training for m in model.modules())


def test_freezing_twice_thaws_once():
    model = network()
    freeze(model)
    freeze(model)
    unfreeze(model)
    assert frozen(model) == {}


def test_frozen_statistics_of_a_layer_of_ours_count_and_thaw():
    layer = batchnorm.BatchNorm1d(3, statistics=batchnorm.Frozen())
    assert frozen(layer) == {"": ("statistics",)}
    unfreeze(layer)
    assert layer.statistics is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_frozen_too(copied):
    model = network()
    freeze(model)
    other = copied(model)
    assert frozen(other) == frozen(model)
    assert not train(other) & names("1", True, True)


def test_compiled_layers_stay_frozen():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    freeze(model, affine=False)
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    x = torch.randn(8, 3)
    y = compiled(x)
    assert not model[1].running_mean.any()
    torch.testing.assert_close(y, model.eval()(x))


def test_what_cannot_be_frozen_is_said_and_nothing_changes():
    model = network()
    with pytest.raises(ValueError, match=r"'3.2' is the name of no batch norm; near .*3\.1"):
        freeze(model, "1", "3.2")
    with pytest.raises(ValueError, match="Sequential has no batch norm"):
        freeze(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="0 has not seen its first input yet"):
        freeze(nn.Sequential(nn.LazyBatchNorm1d()))
    model.append(nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match=r"5 has no running statistics to freeze.*statistics=Fal"):
        freeze(model)
    assert frozen(model) == {}
