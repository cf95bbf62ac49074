"""A replaced forward goes along with its module, and gives way to any change of the network."""

import copy
import io
import pickle

import pytest
import torch
from tests import tolerances
from tests.transforms.networks import BasicBlock, ResNet18
from torch import nn
from torch.nn import functional as F

from batchnorm.transforms.convert import revert
from batchnorm.transforms.fuse import fuse


class Block(nn.Module):
    """A forward with all that can be changed behind the back of its graph."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU()
        self.shortcut = None
        self.flag, self.function, self.order = False, F.relu, [1, 2]
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.act(self.bn(self.conv(x)))
        if self.flag:
            y = y * 2
        y = y if self.shortcut is None else y + self.shortcut(x)
        y = F.dropout(y, 0.5, self.training)
        return self.function(self.tail(y) + sum(self.order) * x)


class WithAFeature(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pair():
    torch.manual_seed(0)
    plain = WithAFeature().double()
    fused = copy.deepcopy(plain)
    assert set(fuse(fused, X).fused) == {"block.bn", "block.tail.1"}
    return fused, plain


def run(model, *args):
    torch.manual_seed(1)
    return model(*args)


def assert_same(fused, plain):
    for training in (True, False):
        for module in (fused, plain):
            module.train(training)
        torch.testing.assert_close(run(fused, X), run(plain, X), rtol=0, atol=tolerances.DOUBLE)


def _hook(name):
    return lambda b: b.get_submodule(name).register_forward_hook(lambda m, i, o: o.sin())


CHANGES = {
    "a flag": lambda b: setattr(b, "flag", True),
    "a function": lambda b: setattr(b, "function", F.silu),
    "a list": lambda b: b.order.append(3),
    "a child where none was": lambda b: setattr(b, "shortcut", nn.Conv2d(3, 3, 1).double()),
    "the activation": lambda b: setattr(b, "act", nn.Tanh()),
    "its slope": lambda b: setattr(b.act, "negative_slope", 0.3),
    "the batch norm": lambda b: setattr(b, "bn", nn.Identity()),
    "its activation": lambda b: setattr(b, "bn", nn.Sequential(b.bn, nn.ReLU())),
    "one more child": lambda b: b.tail.append(nn.Tanh()),
    "another child": lambda b: b.tail.__setitem__(0, nn.Identity()),
    "a hook on the batch norm": _hook("bn"),
    "a hook on the activation": _hook("act"),
    "a hook on a module that it spans": _hook("tail"),
    "a hook on a layer in that": _hook("tail.1"),
    "a hook before the batch norm": lambda b: b.bn.register_forward_pre_hook(
        lambda m, i: (i[0] * 2 + 1,)
    ),
    "the layers back to torch's": revert,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name):
    fused, plain = pair()
    for model in (fused, plain):
        torch.manual_seed(2)
        CHANGES[name](model.block)
    assert_same(fused, plain)


def test_a_hook_of_all_modules_sees_what_it_saw():
    fused, plain = pair()
    seen = {}
    for model in (fused, plain):
        found = seen[model] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o, found=found: found.append((m._get_name(), o.detach().clone()))
        )
        run(model, X)
        handle.remove()
    for (name, value), (was, expected) in zip(seen[fused], seen[plain], strict=True):
        assert name == was
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerances.DOUBLE)


def graph_of(model):
    program = torch.export.export(model.eval(), (X,))
    targets = [str(node.target) for node in program.graph.nodes]
    return [target for target in targets if "batchnorm" in target or "relu" in target]


def test_copies_and_pickles_are_fused_too():
    fused, plain = pair()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    state = copy.deepcopy(plain.state_dict())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), loaded):
        assert graph_of(other) == ["batchnorm.normalize.default"] * 2
        plain.load_state_dict(state)
        assert_same(other, plain)
        for model in (other, plain):  # its forward is that of its own parameters
            nn.init.ones_(model.block.conv.weight)
        assert_same(other, plain)
        for model in (other, plain):  # and it gives way, too
            model.block.order = [plain.block.order[0] + 1]
        assert_same(other, plain)
        plain.block.order = [1, 2]


def test_the_module_is_still_what_it_was():
    fused, plain = pair()
    assert isinstance(fused.block, Block)
    assert repr(fused.block) == repr(plain.block)
    assert fused.block.__class__.__module__ == Block.__module__
    assert fused.block.forward.__name__ == "forward"


def test_state_dicts_and_types_go_both_ways():
    fused, plain = ResNet18(4), ResNet18(4)
    fuse(fused)
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    assert fused.bfloat16()(x).dtype == torch.bfloat16
    fused.double()
    plain.double()
    fused.load_state_dict(plain.state_dict())
    x = x.double()
    torch.testing.assert_close(
        fused.eval()(x), plain.eval()(x), rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE
    )


def test_children_may_be_taken_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), BasicBlock(3, 3))
    model = model.double().eval()
    plain = copy.deepcopy(model)
    fuse(model)
    parts, expected = nn.Sequential(*model.children()), nn.Sequential(*plain.children())
    torch.testing.assert_close(parts(X), expected(X), rtol=0, atol=tolerances.DOUBLE)
    torch.testing.assert_close(model[:2](X), plain[:2](X), rtol=0, atol=tolerances.DOUBLE)
