"""Every parameter once, and decay only where a weight is."""

import pytest
import torch
from torch import nn

from batchnorm.transforms.convert import convert
from batchnorm.transforms.parameter_groups import parameter_groups


def network():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LazyLinear(4),
        nn.LayerNorm(4),
        nn.MultiheadAttention(4, 2),
        nn.Linear(4, 4),
    )
    model[4](torch.zeros(1, 2))
    model[7].weight = model[4].weight  # tied
    return convert(model)


def test_groups():
    model = network()
    decayed, exempt = parameter_groups(model, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == [
        "0.weight", "4.weight", "6.in_proj_weight", "6.out_proj.weight",
    ]  # fmt: skip
    assert {*decayed["params"], *exempt["params"]} == set(model.parameters())
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))


def test_an_optimiser_decays_only_the_first():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.SGD(parameter_groups(model, 0.5), lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    decayed = set(parameter_groups(model, 0.5)[0]["params"])
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old * (0.5 if p in decayed else 1))


def test_negative():
    with pytest.raises(ValueError, match="weight_decay must be 0 or more, got -1"):
        parameter_groups(network(), -1)
