"""What a graph depends on is noted, and what could change unnoticed is refused."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.transforms.symbolic import UntraceableError, trace_forward


class Written(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.written = forward
        self.child = nn.Sequential(nn.ReLU(), nn.Tanh())
        self.size, self.sizes, self.other = 3, [1, 2], object()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x):
        return self.written(self, x)


def traced(forward, inline=(), **options):
    module = Written(forward)
    inline = {module.get_submodule(name) for name in inline}
    return trace_forward(module, inline, **({"training": True, "kind": Tensor} | options))


def reads(result):
    return {(read.path, read.name): read.value for read in result.reads if read.name != "written"}


def test_reads_are_noted():
    def forward(m, x):
        y = x * m.size + sum(m.sizes)
        return m.child(y) * m.gain + m.count

    result = traced(forward)
    assert reads(result) == {((), "size"): 3, ((), "sizes"): [1, 2]}
    assert (result.asks_mode, result.asks_kind) == (False, False)
    assert "child" in [node.target for node in result.graph.nodes]
    result = traced(forward, inline=["child"])
    assert reads(result)[("child",), "_modules"] == ("0", "1")
    assert {"child.0", "child.1"} < {node.target for node in result.graph.nodes}


def test_the_mode_and_the_type_of_arguments_are_what_they_are_said_to_be():
    def forward(m, x):
        y = F.relu(x) if m.training else F.silu(x)
        return y[0] if isinstance(x, list) else y

    for training in (True, False):
        result = traced(forward, training=training)
        assert reads(result) == {((), "training"): training}
        assert result.asks_mode
        assert result.asks_kind
        targets = [node.target for node in result.graph.nodes]
        assert targets[1:-1] == [F.relu if training else F.silu]
    targets = [node.target for node in traced(forward, kind=list).graph.nodes]
    assert len(targets) == 4


def _no_grad(m, x):
    with torch.no_grad():
        return x * 2


def _autocast(m, x):
    with torch.autocast("cpu"):
        return x * 2


class Mapping(dict):
    pass


REFUSED = {
    "values": (lambda m, x: x if x.sum() > 0 else -x, "control flow"),
    "an object": (lambda m, x: x if m.other else -x, "reads 'other', a object"),
    "an attribute set": (lambda m, x: setattr(m, "size", 4) or x, "sets its attribute 'size'"),
    "a list changed": (lambda m, x: m.sizes.append(1) or x, "changes its attribute 'sizes'"),
    "torch's random numbers": (lambda m, x: x * torch.rand(()).item(), "draws random numbers"),
    "Python's": (lambda m, x: x * random.random(), "draws random numbers"),
    "NumPy's": (lambda m, x: x * float(np.random.rand()), "draws random numbers"),  # noqa: NPY002
    "a constant": (lambda m, x: x + torch.ones(3), "does not depend on its input"),
    "no_grad": (_no_grad, r"asks torch.is_grad_enabled\(\)"),
    "autocast": (_autocast, "asks torch.is_autocast_enabled"),
    "a class of its own": (lambda m, x: Mapping(x=x), "makes a Mapping"),
    "an error": (lambda m, x: 1 / 0, "division by zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    forward, reason = REFUSED[name]
    module = Written(forward)
    attributes = dict(module.__dict__, sizes=list(module.sizes))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    with pytest.raises(UntraceableError, match=reason):
        trace_forward(module, set(), training=True, kind=Tensor)
    assert module.__dict__ == attributes
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


def test_buffers_are_not_changed_by_tracing():
    module = Written(lambda m, x: m.count.add_(1) + x)
    trace_forward(module, set(), training=True, kind=Tensor)
    assert torch.equal(module.count, torch.zeros(3))


def test_modules_are_modules_again_afterwards():
    before = nn.Module.__setattr__, nn.Module.__getattribute__, torch.is_grad_enabled
    for forward in (lambda m, x: x, lambda m, x: 1 / 0):
        with contextlib.suppress(UntraceableError):
            traced(forward)
        assert (nn.Module.__setattr__, nn.Module.__getattribute__, torch.is_grad_enabled) == before
