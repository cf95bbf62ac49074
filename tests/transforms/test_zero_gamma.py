"""Blocks begin as what their shortcut computes, however they are written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.transforms.zero_gamma import zero_gamma


class Block(nn.Module):
    """ResNet's, in the ways in which it is written."""

    def __init__(self, how, down=False):
        super().__init__()
        self.last = nn.BatchNorm2d(4) if how != "fused" else batchnorm.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if down else nn.Identity()
        self.how = how

    def forward(self, x):
        y = self.conv2(F.relu(self.bn1(self.conv1(x))))
        if self.how == "fused":
            return self.last(y, self.down(x))
        y = self.last(y)
        if self.how == "in place":
            y += self.down(x)
            return y
        if self.how == "gated":
            y = F.dropout(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))), 0.1)
        return F.relu(torch.add(self.down(x), y))


X = torch.rand(2, 4, 5, 5)


@pytest.mark.parametrize("how", ["plain", "in place", "gated", "fused"])
@pytest.mark.parametrize("down", [False, True])
def test_the_last_of_each_block(how, down):
    torch.manual_seed(0)
    model = nn.Sequential(Block(how), Block(how, down), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    random, before = torch.get_rng_state(), model[0].bn1.running_mean.clone()
    report = zero_gamma(model, X)
    assert report.zeroed == ["0.last", "1.last"]
    assert report.left == {}
    zero = {n for n, p in model.named_parameters() if n.endswith("weight") and not p.any()}
    assert zero == {"0.last.weight", "1.last.weight"}
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(model[0].bn1.running_mean, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model[0](X), X)  # X is positive: relu does nothing


class Sum(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x) + self.b(x)


def conv_norm(**options):
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, **options))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Sum(nn.Identity(), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))), "does not end"),
        (Sum(conv_norm(), conv_norm()), "no branch is the residual one"),
        (Sum(nn.Identity(), conv_norm(affine=False)), "b.1 has no γ"),
    ],
    ids=["preactivation", "two branches", "no γ"],
)
def test_blocks_that_are_left(model, reason):
    before = [p.detach().clone() for p in model.parameters()]
    report = zero_gamma(model, X)
    assert report.zeroed == []
    assert reason in next(iter(report.left.values()))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_sum_is_not_the_end_of_a_batch_norm():
    report = zero_gamma(Sum(nn.Identity(), Sum(conv_norm(), nn.Tanh())), X)
    assert report.zeroed == ["b.a.1"]
    assert report.left == {"b.a.1": "the block does not end in a batch norm"}


def test_no_residual_blocks():
    with pytest.raises(ValueError, match="it has no residual blocks"):
        zero_gamma(nn.Sequential(conv_norm(), nn.ReLU()), X)
