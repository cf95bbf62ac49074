"""There and back, whatever the class; what several processes then compute is in distributed/."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from tests import tolerances
from torch import nn

import batchnorm
from batchnorm import Frozen, Ghost, Sync, desynchronize, synchronize
from batchnorm.nn import BatchNorm
from batchnorm.transforms.convert import revert


class Bounded(nn.BatchNorm2d):
    """Adds to torch's forward."""

    def __init__(self, channels, bound):
        super().__init__(channels)
        self.bound = bound

    def forward(self, x):
        return super().forward(x).clamp(-self.bound, self.bound)


class Named(nn.BatchNorm1d):
    """Adds nothing to forward."""


class AnyRank(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input):
        if input.dim() < 2:
            raise ValueError("too few axes")


class OfOurs(batchnorm.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def network():
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3, momentum=None)
    return nn.Sequential(
        shared,
        nn.Sequential(shared, Bounded(3, 0.5)),
        OfOurs(3),
        batchnorm.BatchNorm2d(3, activation="relu", guard=batchnorm.Guard()),
        nn.Flatten(),
        nn.BatchNorm1d(12, affine=False),
        Named(12),
        AnyRank(12),
    )


def draw(n=6):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def step(model):
    model.zero_grad()
    y = model(draw())
    y.square().mean().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_there_and_back():
    theirs, model = network(), network()
    classes = [type(m) for m in model.modules()]
    attributes = [{*vars(m)} for m in model.modules()]
    text = repr(model)
    modules, parameters = list(model.modules()), list(model.parameters())
    calls = []
    model[1][1].register_forward_hook(lambda *_: calls.append(1))

    report = synchronize(model)
    assert report.changed == ["0", "1.1", "2", "3", "5", "6", "7"]
    assert report.left == {}
    assert all(m.statistics == Sync() for m in norms(model))
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert "Bounded(3, eps=1e-05, momentum=0.1, affine=True, bias=True, " in repr(model)
    for _ in range(2):
        torch.testing.assert_close(
            step(model), step(theirs), rtol=tolerances.SINGLE, atol=tolerances.SINGLE
        )
    torch.testing.assert_close(model.state_dict(), theirs.state_dict())
    assert len(calls) == 2

    assert synchronize(model) == report  # again changes nothing
    back = desynchronize(model)
    assert back == report
    assert [type(m) for m in model.modules()] == classes
    assert [{*vars(m)} for m in model.modules()] == attributes
    assert repr(model) == text
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=0, atol=1e-6)
    assert desynchronize(model).changed == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_users_class_can_be_copied_and_saved(duplicate):
    layer = Bounded(3, 0.5)
    synchronize(layer)
    other = duplicate(layer)
    assert type(other) is type(layer)
    assert torch.equal(other(draw()), layer(draw()))
    desynchronize(other)
    assert type(other) is Bounded


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


class Explicit(nn.BatchNorm2d):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x).relu()


class SomeTimes(nn.BatchNorm2d):
    def forward(self, x):
        if x.is_contiguous():
            return super().forward(x)
        return nn.functional.batch_norm(x, self.running_mean, self.running_var)


class Above(Own):
    def forward(self, x):
        return super().forward(x) + 1


class Activated(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(super().forward(x))


class OfTorchsSync(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x).relu()


def replaced():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


LEFT = {
    "ghost": (lambda: batchnorm.BatchNorm2d(3, statistics=Ghost(2)), r"has statistics=Ghost"),
    "frozen": (lambda: batchnorm.BatchNorm2d(3, statistics=Frozen()), r"has statistics=Frozen"),
    "own forward": (lambda: Own(3), "is a Own, whose forward may not go through torch's; let"),
    "explicit": (lambda: Explicit(3), "is a Explicit, whose forward"),
    "sometimes": (lambda: SomeTimes(3), "is a SomeTimes, whose forward"),
    "above": (lambda: Above(3), "is a Above, whose forward"),
    "replaced": (replaced, "is a BatchNorm2d, whose forward"),
    "activation": (lambda: Activated(3), "is a Activated, which has .* own for activation"),
    "torch's sync": (lambda: OfTorchsSync(3), "a subclass of torch.nn.SyncBatchNorm, which"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_synchronised_is_left_with_the_reason(case):
    make, reason = LEFT[case]
    model = nn.Sequential(nn.BatchNorm2d(3), make())
    kind, attributes = type(model[1]), {*vars(model[1])}
    report = synchronize(model)
    assert report.changed == ["0"]
    assert list(report.left) == ["1"]
    assert re.search(reason, report.left["1"])
    assert type(model[1]) is kind
    assert {*vars(model[1])} == attributes


def test_torchs_sync_batch_norm_becomes_one_that_can_be_taken_back():
    for change in (synchronize, desynchronize):
        model = nn.Sequential(nn.SyncBatchNorm(3), OfTorchsSync(3))
        keys = list(model.state_dict())
        report = change(model)
        assert report.changed == ["0"]
        assert list(report.left) == ["1"]
        assert type(model[0]) is BatchNorm
        assert list(model.state_dict()) == keys
        assert model[0](draw()).shape == (6, 3, 2, 2)
        assert model[0](torch.randn(4, 3)).shape == (4, 3)
    assert model[0].statistics is None
    with pytest.raises(ValueError, match="0 is a batch norm for inputs of any rank"):
        revert(model)
    model[0].__class__ = batchnorm.BatchNorm2d
    assert type(revert(model)[0]) is nn.BatchNorm2d


def test_what_a_layer_got_meanwhile_stays():
    layer = nn.BatchNorm2d(3)
    synchronize(layer)
    layer.activation = "relu"
    desynchronize(layer)
    assert type(layer) is batchnorm.BatchNorm2d
    assert layer.activation == "relu"


def test_half_networks_widen_and_narrow():
    model = nn.Sequential(nn.BatchNorm2d(3), Bounded(3, 1), nn.SyncBatchNorm(3)).bfloat16()
    synchronize(model)
    assert all(m.running_mean.dtype == torch.float32 for m in norms(model))
    model(draw().bfloat16())
    desynchronize(model)
    assert [m.running_mean.dtype.itemsize for m in norms(model)] == [2, 2, 4]
    model(draw().bfloat16())


def test_frozen_layers_stay_frozen():
    model = network()
    batchnorm.freeze(model, affine=False)
    synchronize(model)
    before = copy.deepcopy(model.state_dict())
    model.train()(draw())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(batchnorm.frozen(model)) == 7


def test_bad_arguments_change_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(
        TypeError, match=r"must be a torch\.distributed\.ProcessGroup or None, got 3"
    ):
        synchronize(model, 3)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="has no batch norm"):
        synchronize(nn.Sequential(nn.ReLU()))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_process_group(group):
    """Of one process: as without; and what can be done with a value that holds one."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=group))
    synchronize(model)
    assert model[0].statistics == Sync()
    assert model[1].statistics == Sync(group)
    assert repr(model[1].statistics) == "Sync(process_group=<ProcessGroup of 1>)"
    plain = nn.BatchNorm2d(3)
    torch.testing.assert_close(model[1](draw()), plain(draw()))
    assert copy.deepcopy(model)[1].statistics is model[1].statistics
    with pytest.raises(pickle.PicklingError, match="save the state_dict, or call desynchronize"):
        pickle.dumps(model)
    synchronize(model, group)
    assert model[0].statistics == Sync(group)
