"""What feeds what is found by running the network, however it is written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.transforms.dataflow import preserved, trace
from batchnorm.transforms.insert import insert


class Network(nn.Module):
    """Registered in another order than it runs, with everything that can stand in between."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.bn = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Linear(8, 8)
        self.narrow = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.first(x)).relu_()
        x = F.max_pool2d(x + self.second(x), 2)
        x = torch.sigmoid(x.mean((2, 3)).repeat(1, 4))
        x = self.shared(self.shared(torch.tanh(self.narrow(x))))
        if x.sum() > -1e9:  # control flow that depends on the data
            x = F.gelu(x)
        return self.last(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Network()


EXAMPLE = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_trace(model: nn.Module) -> None:
    flows = {flow.name: flow for flow in trace(model, EXAMPLE)}
    assert list(flows) == ["first", "second", "narrow", "shared", "last"]
    assert {name: flow.norm for name, flow in flows.items() if flow.norm} == {"first": "bn"}
    # the mean of second's output reaches the sigmoid only through a mean and a repeat
    nonlinear = {name for name, flow in flows.items() if flow.nonlinear}
    assert nonlinear == {"first", "narrow", "shared"}
    assert {name: flow.calls for name, flow in flows.items() if flow.calls > 1} == {"shared": 2}


def test_trace_leaves_the_model_as_it_was(model: nn.Module) -> None:
    model.bn.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    trace(model, EXAMPLE)
    assert [m.training for m in model.modules()].count(False) == 1
    assert not model.bn.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_preserved_puts_a_replaced_buffer_back() -> None:
    layer = nn.BatchNorm1d(2)
    buffer = layer.running_mean
    with preserved(layer):
        layer.running_mean = torch.ones(2)
    assert layer.running_mean is buffer
    assert not buffer.any()


def test_insert_refuses_a_network_without_a_place() -> None:
    with pytest.raises(ValueError, match="no convolution or fully connected module leads to"):
        insert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "batch", torch.randn(2, 4))
