"""What comes in the place of batch norms, what goes along, and the way back."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.transforms.recalibrate import recalibrate
from batchnorm.transforms.replace import replace


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 6), batchnorm.BatchNorm1d(6, activation="silu"),
    ).double()  # fmt: skip
    for layer in (model[1], model[5]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return model


def draw(n, *shape):
    shape = shape or (3, 6, 6)
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def by_hand(x, groups, layer):
    """Group norm by its formula: the moments of each sample and group."""
    parts = x.reshape(len(x), groups, -1)
    z = (parts - parts.mean(2, keepdim=True)) / (
        parts.var(2, keepdim=True, correction=0) + layer.eps
    ).sqrt()
    shape = (-1, *[1] * (x.dim() - 2))
    return z.reshape(x.shape) * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize(("norm", "groups"), [("group", (4, 2)), ("layer", (1, 1))])
def test_a_norm_of_each_sample_with_γ_β_and_ε_of_before(norm, groups):
    model = network()
    before = copy.deepcopy(model)
    done = replace(model, norm, draw(2))
    assert done.changes == [
        f"1: BatchNorm2d replaced by {norm} norm",
        f"5: BatchNorm1d replaced by {norm} norm",
    ]
    x = draw(5)
    y = before[4](by_hand(before[0](x), groups[0], before[1]).relu().flatten(1))
    y = F.silu(by_hand(y, groups[1], before[5]))
    torch.testing.assert_close(model(x), y, rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_none_gives_the_bias_back_with_the_value_of_β():
    model = network()
    before = copy.deepcopy(model)
    done = replace(model, "none", draw(2))
    assert done.changes[0] == "1: BatchNorm2d replaced by identity, bias of 0 restored"
    assert done.changes[1] == "5: BatchNorm1d replaced by identity"
    x = draw(5)
    y = (before[0](x) + before[1].bias.view(-1, 1, 1)).relu()
    torch.testing.assert_close(model(x), F.silu(before[4](y.flatten(1))))
    assert model[0].bias.requires_grad


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
def test_undo_brings_back_the_very_network(norm):
    model = network()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    done = replace(model, norm, draw(2))
    assert all(not isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    done.undo()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_back_to_batch_norm_with_statistics_to_measure():
    model = network()
    before = copy.deepcopy(model)
    replace(model, "group", draw(2))
    done = replace(model, "batch", draw(2))
    assert done.changes == [
        "1: GroupNorm replaced by batch norm",
        "5.0: GroupNorm replaced by batch norm",
    ]
    assert isinstance(model[1], batchnorm.BatchNorm2d)
    assert isinstance(model[5][0], batchnorm.BatchNorm1d)
    x = draw(8)
    torch.testing.assert_close(model(x), before(x))  # in training
    for net in (model, before):
        recalibrate(net, [draw(8), draw(9)])
        net.eval()
    torch.testing.assert_close(model(x), before(x), rtol=1e-6, atol=tolerances.SINGLE)


def test_a_shared_layer_stays_shared():
    norm = nn.BatchNorm1d(4)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model = nn.Sequential(first, norm, second, norm)
    assert len(replace(model, "group", torch.randn(2, 4)).changes) == 2
    assert isinstance(model[1], nn.GroupNorm)
    assert model[1] is model[3]
    model = nn.Sequential(first, norm, second, norm)
    replace(model, "none", torch.randn(2, 4))
    assert first.bias is not None
    assert second.bias is not None


def test_state_goes_along():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4)
    ).bfloat16()
    model[2].weight.requires_grad_(False)
    model[2].eval()
    replace(model, "group", torch.randn(2, 2, 3).bfloat16())
    assert model[1].weight is None
    assert model[1].bias is None
    assert model[2].weight.dtype == torch.bfloat16
    assert not model[2].weight.requires_grad
    assert model[2].bias.requires_grad
    assert model[1].training
    assert not model[2].training
    assert model(torch.randn(2, 2, 3).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("dims", "rank"), [(2, 1), (3, 1), (4, 2), (5, 3)])
def test_the_example_tells_the_rank(dims, rank):
    model = nn.Sequential(nn.GroupNorm(2, 4))
    replace(model, "batch", torch.randn(3, 4, *[2] * (dims - 2)))
    assert type(model[0]) is getattr(batchnorm, f"BatchNorm{rank}d")
    model(torch.randn(3, 4, *[2] * (dims - 2)))


class Clipped(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).clamp(-0.1, 0.1)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        return x


class Residual(Unused):
    def __init__(self):
        super().__init__()
        self.bn = batchnorm.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(x, residual=x)


@pytest.mark.parametrize(
    ("model", "norm", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(4)), "instance", "one of none, batch.*got 'instance'"),
        (nn.Sequential(nn.Linear(4, 4)), "group", "Sequential has no batch norm"),
        (nn.Sequential(nn.BatchNorm1d(4)), "batch", "no GroupNorm to replace"),
        (nn.BatchNorm1d(4), "group", "put it into an nn.Sequential"),
        (nn.Sequential(nn.BatchNorm1d(4), Clipped(4)), "group", "1 is a Clipped, which may do"),
        (Residual(), "group", "bn is a BatchNorm1d, which may do more"),
        (Unused(), "group", "bn does not run on the example"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_refusing_changes_nothing(model, norm, message):
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        replace(model, norm, torch.randn(2, 4))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(m.training for m in model.modules())
