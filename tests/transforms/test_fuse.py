"""Fused networks train as they did; what cannot be fused stays, with the reason."""

import copy
import time

import pytest
import torch
from tests import tolerances
from tests.transforms.networks import BasicBlock, ResNet18
from tests.transforms.networks_timm import timm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import batchnorm
from batchnorm import fold, freeze, recalibrate, revert, unfreeze
from batchnorm.transforms.fuse import fuse, unfuse

BATCH_NORM = nn.modules.batchnorm._BatchNorm


def draw(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def trained(model):
    """Statistics, γ and β as training leaves them: none of them trivial."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, BATCH_NORM):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.3, 3, generator=generator)
            nn.init.uniform_(layer.weight, 0.5, 2, generator=generator)
            nn.init.normal_(layer.bias, generator=generator)
    return model.double()


def everything(model, *example):
    """Outputs in both modes, gradients of inputs and parameters, and statistics after them."""
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x in example]
    torch.manual_seed(0)  # for dropout
    with torch.no_grad():
        y = model.eval()(*[x.clone() for x in inputs])
    torch.manual_seed(0)
    z = model.train()(*[x * 1 for x in inputs])  # not leaves, so that a network may write to them
    outputs = [t for both in (y, z) for t in (both if isinstance(both, tuple) else (both,))]
    sum(t.sin().sum() for t in outputs if t.requires_grad).backward()
    return {
        "outputs": [t.detach() for t in outputs],
        "inputs": [x.grad for x in inputs],
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def assert_same(model, other, *example):
    torch.testing.assert_close(
        everything(model, *example),
        everything(other, *example),
        rtol=tolerances.DOUBLE,
        atol=tolerances.DOUBLE,
    )


def assert_fuses(model, *example, fused, left=None):
    """Fuse with and without the example, and compare on it and on other input."""
    model = trained(model)
    for verified in (True, False):
        plain, ours = copy.deepcopy(model), copy.deepcopy(model)
        objects = dict(ours.named_modules())
        report = fuse(ours, *example) if verified else fuse(ours)
        assert report.fused == fused, report
        assert set(report.left) == set(left or {}), report
        for name, reason in (left or {}).items():
            assert reason in report.left[name]
        assert (report.largest_difference is None) != verified
        for name, module in ours.named_modules():
            assert module is objects[name]
            assert isinstance(module, type(plain.get_submodule(name)))
        assert list(ours.state_dict()) == list(plain.state_dict())
        assert_same(ours, plain, *example)
        assert_same(ours, plain, *[draw(*x.shape, seed=2) for x in example])
        assert_runs_fused(ours, fused, *example)
    return ours


def assert_runs_fused(model, fused, *example):
    """Each layer really gets what it took over, and nothing else of it is computed."""
    got = {}
    layers = {layer: name for name, layer in model.named_modules()}
    forward = batchnorm.nn.batchnorm._BatchNorm.forward

    def spy(layer, x, residual=None, *, mask=None, activation=None):
        kinds = (["add"] if residual is not None else []) + [activation or layer.activation or ""]
        if kinds != [""]:
            got.setdefault(layers[layer], set()).add(", ".join(kinds).strip(", "))
        return forward(layer, x, residual, mask=mask, activation=activation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batchnorm.nn.batchnorm._BatchNorm, "forward", spy)
        model(*example)
    assert {name: "; ".join(sorted(kinds)) for name, kinds in got.items()} == fused


def assert_left(model, *example, reason, layer="bn"):
    assert_fuses(model, *example, fused={}, left={layer: reason})


class Written(nn.Module):
    """A convolution, a batch norm, and a forward written as a function of the module and x."""

    def __init__(self, forward, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        for name, module in modules.items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


X = draw(4, 3, 5, 5)

MODULES = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(inplace=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_an_activation_that_is_a_module(name):
    model = Written(lambda m, x: m.act(m.bn(m.conv(x))) * 2, act=MODULES[name])
    assert_fuses(model, X, fused={"bn": name.split()[0]})


FUNCTIONS = {
    "F.relu": ("relu", F.relu),
    "F.relu in place": ("relu", lambda y: F.relu(y, inplace=True)),
    "F.relu_": ("relu", F.relu_),
    "torch.relu": ("relu", torch.relu),
    "torch.relu_": ("relu", torch.relu_),
    "relu()": ("relu", lambda y: y.relu()),
    "relu_()": ("relu", lambda y: y.relu_()),
    "F.relu6": ("relu6", F.relu6),
    "F.leaky_relu": ("leaky_relu", F.leaky_relu),
    "F.leaky_relu with its slope": ("leaky_relu", lambda y: F.leaky_relu(y, 0.01, True)),
    "F.silu": ("silu", F.silu),
    "F.gelu": ("gelu", lambda y: F.gelu(y, approximate="none")),
    "F.hardswish": ("hardswish", F.hardswish),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_that_is_a_function(name):
    kind, function = FUNCTIONS[name]
    model = Written(lambda m, x: function(m.bn(m.conv(x))) * 2)
    assert_fuses(model, X, fused={"bn": kind})


def _in_place(y, r):
    y += r
    return y


SUMS = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": _in_place,
    "torch.add": torch.add,
    "torch.add(r, y)": lambda y, r: torch.add(r, y),
    "alpha=1": lambda y, r: torch.add(y, r, alpha=1),
    "add": lambda y, r: y.add(r),
    "add_": lambda y, r: y.add_(r),
}


@pytest.mark.parametrize("activation", [None, F.relu, F.silu])
@pytest.mark.parametrize("name", SUMS)
def test_a_residual_sum(name, activation):
    model = Written(lambda m, x: (activation or (lambda y: y * 1))(SUMS[name](m.bn(m.conv(x)), x)))
    kind = "add" if activation is None else f"add, {activation.__name__}"
    assert_fuses(model, X, fused={"bn": kind})


def test_a_resnet():
    fused = {"bn1": "relu"}
    left = {}
    for stage in range(1, 5):
        for block in range(2):
            fused[f"layer{stage}.{block}.bn1"] = "relu"
            fused[f"layer{stage}.{block}.bn2"] = "add, relu"
        if stage > 1:
            left[f"layer{stage}.0.shortcut.1"] = f"is what layer{stage}.0.bn2 adds"
    torch.manual_seed(0)
    model = assert_fuses(ResNet18(8), draw(4, 3, 16, 16), fused=fused, left=left)
    text = "17 of 20 batch norms fused (9 × relu, 8 × add, relu)\nleft: layer2.0.shortcut.1: its"
    assert str(fuse(model)).startswith(text)


def test_identities_between_are_passed():
    model = Written(
        lambda m, x: m.act(m.no(m.no(m.bn(m.conv(x))) + x)), no=nn.Identity(), act=nn.ReLU()
    )
    assert_fuses(model, X, fused={"bn": "add, relu"})


def test_of_two_batch_norms_that_are_added_the_later_adds():
    model = Written(lambda m, x: F.relu(m.bn(m.conv(x)) + m.other(x)), other=nn.BatchNorm2d(3))
    assert_fuses(model, X, fused={"other": "add, relu"}, left={"bn": "is what other adds"})
    model = Written(lambda m, x: F.relu(m.other(x) + m.bn(m.conv(x))), other=nn.BatchNorm2d(3))
    assert_fuses(model, X, fused={"bn": "add, relu"}, left={"other": "is what bn adds"})


def test_a_shared_activation_and_a_shared_layer():
    def twice(m, x):
        return m.act(m.bn(m.act(m.bn(m.conv(x)))) + x)

    model = Written(twice, act=nn.ReLU(inplace=True))
    assert_fuses(model, X, fused={"bn": "add, relu; relu"})


def test_a_shared_layer_keeps_its_order():
    def siamese(m, x):
        a = m.bn(x)
        b = m.bn(x * 2)
        return F.relu(a + x) * F.relu(b)

    # The first of its calls would come after the second if it waited for the sum.
    assert_fuses(Written(siamese), X, fused={"bn": "relu"})


class Branch(nn.Module):
    """The batch norm ends a child; the sum and the activation are its parent's."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(),
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        )  # fmt: skip
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return self.head(self.branch(x) + x)


def test_a_place_that_spans_modules():
    fused = {"branch.1": "relu", "branch.3.1": "add, relu"}
    model = assert_fuses(Branch(), X, fused=fused)
    # On its own the branch is what it was.
    plain = unfuse(copy.deepcopy(model))
    assert_same(model.branch, plain.branch, X)
    left = Branch()
    left.branch.register_forward_hook(lambda *_: None)
    assert_fuses(left, X, fused={"branch.1": "relu"}, left={"branch.3.1": "the border of branch"})


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([BasicBlock(3, 3), BasicBlock(3, 3)])
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if x.mean() > 1e9:
                break
        return F.relu(self.bn(x))


def test_blocks_of_a_network_that_cannot_be_traced():
    fused = {
        f"blocks.{i}.bn{n}": kind for i in (0, 1) for n, kind in ((1, "relu"), (2, "add, relu"))
    }
    reason = "the forward of Routed cannot be traced: symbolically traced variables cannot be used"
    assert_fuses(Routed(), X, fused=fused, left={"bn": reason})


def _reads_a_list(m, xs):
    y = torch.cat([xs] if isinstance(xs, torch.Tensor) else xs, 1)
    return F.relu(m.bn(m.conv(y)))


def test_a_block_that_asks_what_its_argument_is():
    block = trained(Written(_reads_a_list))
    plain = copy.deepcopy(block)
    assert fuse(block).fused == {"bn": "relu"}
    pieces = [X[:, :1], X[:, 1:]]
    for inputs in (X, pieces):
        torch.testing.assert_close(block(inputs), plain(inputs), rtol=0, atol=tolerances.DOUBLE)
        assert_runs_fused(block, {"bn": "relu"}, inputs)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, residual=None, *, scale=1):
        y = self.bn(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) * scale


def test_arguments_that_may_be_left_out():
    model = assert_fuses(Optional(), X, fused={"bn": "relu"})
    plain = unfuse(copy.deepcopy(model))
    for args, named in (
        ((X, X), {}),
        ((X,), {"residual": X}),
        ((X,), {"scale": 3}),
        ((), {"x": X}),
    ):
        assert torch.equal(model(*args, **named), plain(*args, **named))
    with pytest.raises(TypeError, match="nonsense"):
        model(X, nonsense=1)
    with pytest.raises(TypeError, match="missing"):
        model()


def test_dropout_follows_the_mode():
    def forward(m, x):
        return F.dropout(F.relu(m.bn(m.conv(x))), 0.5, training=m.training)

    assert_fuses(Written(forward), X, fused={"bn": "relu"})


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.scale = nn.BatchNorm2d(3), nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return F.relu(self.bn(x * self.scale)) * self.scale


def test_parameters_and_buffers_of_the_block():
    assert_fuses(Scaled(), X, fused={"bn": "relu"})


LEFT = {
    "used twice": (lambda m, x: F.relu(y := m.bn(x)) + y, {}, "its output goes to relu"),
    "returned too": (lambda m, x: (F.relu(y := m.bn(x)), y), {}, "and the output of the network"),
    "added to itself": (lambda m, x: (y := m.bn(x)) + y, {}, "its output goes to add twice"),
    "activated first": (
        lambda m, x: m.conv(x) + F.tanh(m.bn(x)), {}, "its output goes to tanh",
    ),
    "a number": (lambda m, x: m.bn(x) + 1, {}, "adds a number"),
    "alpha": (lambda m, x: torch.add(m.bn(x), x, alpha=2), {}, "does more than add"),
    "slope": (lambda m, x: F.leaky_relu(m.bn(x), 0.2), {}, "leaky_relu(..., negative_slope=0.2"),
    "slope of a module": (
        lambda m, x: m.act(m.bn(x)), {"act": nn.LeakyReLU(0.2)}, "LeakyReLU(negative_slope=0.2)",
    ),
    "approximation": (
        lambda m, x: F.gelu(m.bn(x), approximate="tanh"), {}, "gelu(..., approximate=tanh)",
    ),
    "approximation of a module": (
        lambda m, x: m.act(m.bn(x)), {"act": nn.GELU("tanh")}, "GELU(approximate='tanh')",
    ),
    "dropout": (
        lambda m, x: F.relu(m.drop(m.bn(x))), {"drop": nn.Dropout()}, "drop, Dropout(p=0.5",
    ),
    "view": (lambda m, x: F.relu(m.bn(x).view(4, -1)), {}, "its output goes to view"),
    "nothing": (lambda m, x: m.bn(x), {}, "its output goes to the output of the network"),
    "unused": (lambda m, x: (m.bn(x), x * 2)[1], {}, "nothing takes its output"),
    "a sum read again": (
        lambda m, x: (y := m.bn(x), y.add_(x), y * 2)[2], {}, "its output goes to add_ and mul",
    ),
    "a sum in the other's place": (
        lambda m, x: (r := m.conv(x) * 2).add_(m.bn(x)) * r, {}, "changes a value in place",
    ),
    "draws": (
        lambda m, x: F.relu(m.bn(x)) * torch.rand(()).item(), {}, "draws random numbers of its own",
    ),
    "makes a tensor": (
        lambda m, x: F.relu(m.bn(x)) + torch.ones(3, 1, 1), {}, "does not depend on its input",
    ),
    "without gradient": (
        lambda m, x: m.conv(_without_gradient(m, x)), {}, "asks torch.is_grad_enabled()",
    ),
    "writes": (
        lambda m, x: (setattr(m, "seen", 1), F.relu(m.bn(x)))[1], {}, "sets its attribute 'seen'",
    ),
}  # fmt: skip


def _without_gradient(m, x):
    with torch.no_grad():
        return F.relu(m.bn(x))


@pytest.mark.filterwarnings("ignore:nn.functional.tanh:UserWarning")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    forward, modules, reason = LEFT[name]
    model = trained(Written(forward, **modules))
    if name == "draws":
        report = fuse(model)
        assert reason in report.left["bn"]
    else:
        assert_left(model, X, reason=reason)


@pytest.mark.parametrize("view", [False, True])
def test_an_input_that_changes_before_the_sum(view):
    def forward(m, x):
        z = x * 2
        y = m.bn(z)
        r = z.view(-1).relu_().view_as(z) if view else z.relu_()
        return y + r

    model = trained(Written(forward)).eval()
    expected = model(X)
    assert "behind relu_, which may change its input in place" in fuse(model).left["bn"]
    torch.testing.assert_close(model(X), expected, rtol=0, atol=tolerances.DOUBLE)


def test_a_residual_of_another_shape():
    model = Written(lambda m, x: F.relu(m.bn(m.conv(x)) + x.mean((2, 3), keepdim=True)))
    model = trained(model)
    plain, blind = copy.deepcopy(model), copy.deepcopy(model)
    report = fuse(model, X)
    assert report.left == {"bn": "adds a value of another shape or type on the example"}
    assert type(model) is Written
    fuse(blind)
    assert_same(blind, plain, X)


def test_a_block_that_the_example_does_not_reach():
    model = Written(lambda m, x: F.relu(m.bn(x)), other=BasicBlock(3, 3))
    report = fuse(trained(model), X)
    assert report.fused == {"bn": "relu"}
    assert "does not run on the example" in report.left["other.bn1"]


def test_layers_that_are_more_than_batch_norm():
    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (
        Louder(3),
        nn.SyncBatchNorm(3),
        parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None),
    ):
        model = nn.Sequential(layer, nn.ReLU())
        report = fuse(model)
        assert "which may do more than normalise" in report.left["0"]
        assert type(model) is nn.Sequential
    model = nn.Sequential(batchnorm.BatchNorm2d(3, activation="silu"), nn.ReLU())
    assert fuse(model).left == {"0": "activates already, by silu"}


def test_a_subclass_that_only_activates_becomes_ours():
    class Acting(nn.BatchNorm2d):
        def __init__(self, channels, act):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), act

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    class Square(Acting):
        def forward(self, x):
            return super().forward(x) ** 2

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), Acting(3, nn.SiLU()), Acting(3, nn.Identity()), nn.ReLU()
    )
    model = assert_fuses(model, X, fused={"1": "silu", "2": "relu"})
    plain = unfuse(copy.deepcopy(model))
    assert [type(m) for m in plain] == [nn.Conv2d, Acting, Acting, nn.ReLU]
    assert_same(model, plain, X)
    for change in (nn.GELU(), nn.Dropout()):  # what it took over is not there any more
        for network in (model, plain):
            network[1].act = change
            network[2].drop = change
        assert_same(model, plain, X)
    assert "more than normalise" in fuse(nn.Sequential(Square(3, nn.ReLU()))).left["0"]


def test_hooks_are_kept_or_the_place_is_left():
    for hooked in ("bn", "act"):
        model = Written(lambda m, x: m.act(m.bn(m.conv(x))), act=nn.ReLU())
        getattr(model, hooked).register_forward_hook(lambda m, i, o: o * 3)
        assert_left(model, X, reason="hook")
    model = Written(lambda m, x: m.act(m.bn(m.conv(x))), act=nn.ReLU())
    model.register_forward_hook(lambda m, i, o: o + 1)
    model.conv.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    assert_fuses(model, X, fused={"bn": "relu"})


def test_parametrized_neighbours_are_no_hindrance():
    conv = parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    assert_fuses(nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU()), X, fused={"1": "relu"})


def test_frozen_layers_fuse_and_stay_frozen():
    model = trained(ResNet18(4))
    freeze(model, "layer1.*")
    plain, x = copy.deepcopy(model), draw(4, 3, 8, 8)
    assert len(fuse(model, x).fused) == 17
    assert_same(model, plain, x)
    unfreeze(model)
    unfreeze(plain)
    assert_same(model, plain, x)


def test_other_verbs_see_the_network_as_it_was():
    x = draw(4, 3, 8, 8)
    model, plain = (trained(ResNet18(4)).eval() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    fuse(model, x)
    for network in (model, plain):
        recalibrate(network, [(x,), (x * 2,)])
    assert_same(model, plain, x)
    assert fold(model.eval(), x).folded == fold(plain.eval(), x).folded
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=tolerances.DOUBLE)
    assert not [m for m in model.modules() if isinstance(m, BATCH_NORM)]


def test_unfuse_and_revert_give_the_original_back():
    x = draw(2, 3, 8, 8)
    model = trained(ResNet18(4)).eval()
    plain = copy.deepcopy(model)
    fuse(model)
    assert revert(unfuse(model)) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in plain.modules()]
    assert torch.equal(model(x), plain(x))
    # What an exporter to ONNX gets to see is torch's own operations.
    program = torch.export.export(model, (x,))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert all(target.namespace == "aten" for target in targets)


def test_fusing_twice_is_fusing_once():
    model = trained(ResNet18(4))
    first = fuse(model)
    x = draw(2, 3, 8, 8)
    again = fuse(model, x)
    assert (first.fused, first.left) == (again.fused, again.left)
    assert type(unfuse(model)) is ResNet18


def test_bad_input_leaves_the_network_as_it_was():
    with pytest.raises(ValueError, match="Linear has no batch norm"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has not seen its first input"):
        fuse(nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU()))

    class Counting(Written):
        def forward(self, x):
            COUNT.append(1)
            return F.relu(self.bn(x)) * len(COUNT)

    COUNT = []
    model = Counting(None)
    state, attributes = copy.deepcopy(model.state_dict()), dict(model.bn.__dict__)
    with pytest.raises(ValueError, match="outputs of the fused network differ by"):
        fuse(model, X.float())
    assert type(model) is Counting
    assert type(model.bn) is nn.BatchNorm2d
    assert model.bn.__dict__ == attributes
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        fuse(model.conv and nn.Sequential(model.conv, model.bn), torch.zeros(2, 5, 4, 4))


def test_verifying_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = ResNet18(4)
    before = {name: (t, t.clone(), t.dtype) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    report = fuse(model, torch.zeros(4, 3, 8, 8) + torch.arange(8.0))
    assert report.largest_difference < tolerances.DOUBLE  # in float64, though the network is not
    for name, tensor in model.state_dict(keep_vars=True).items():
        was, value, dtype = before[name]
        assert tensor is was
        assert tensor.dtype == dtype
        assert torch.equal(tensor, value)
        assert tensor.grad is None
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_a_network_with_a_type_written_into_it_is_verified_in_that():
    model = Written(lambda m, x: F.relu(m.bn(m.conv(x.float()))))
    report = fuse(model, X)
    assert report.fused == {"bn": "relu"}
    assert 0 <= report.largest_difference < tolerances.LIKE_TORCH


def bytes_saved(model, x):
    """How much the backward of one step holds on to."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(storage.nbytes() for storage in kept.values())


def test_intermediate_values_are_not_kept():
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU())]
    plain, x = nn.Sequential(*layers), torch.randn(8, 8, 16, 16)
    fused = copy.deepcopy(plain)
    fuse(fused)
    value = x.untyped_storage().nbytes()
    # One value fewer for each layer, the one between normalising and activating.
    saved = bytes_saved(plain, x) - bytes_saved(fused, x)
    assert saved == pytest.approx(3 * value, rel=0.01)


def test_training_goes_on_as_it_would_have():
    datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra 'digits'")
    images, classes = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images).view(-1, 1, 8, 8) / 16
    t = torch.tensor(classes)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
        BasicBlock(6, 6), BasicBlock(6, 12, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 10),
    ).double()  # fmt: skip

    def losses(model, steps, start):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(start, start + steps):
            batch = slice(32 * step, 32 * (step + 1))
            loss = F.cross_entropy(model.train()(x[batch]), t[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    first = list(losses(model, 12, 0))
    assert first[-1] < 0.9 * first[0]
    fused = copy.deepcopy(model)
    assert len(fuse(fused, x[:16]).fused) == 5
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=0, atol=tolerances.DOUBLE)
    torch.testing.assert_close(
        list(losses(fused, 5, 12)), list(losses(model, 5, 12)), rtol=tolerances.DOUBLE, atol=0
    )


def test_compile_without_graph_breaks():
    torch.manual_seed(0)
    model, x = Branch().double(), X
    plain = copy.deepcopy(model)
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for network in (compiled, plain):
        network(x).sin().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE, msg=name
        )
    torch.testing.assert_close(compiled.eval()(x), plain.eval()(x), rtol=0, atol=tolerances.DOUBLE)


def test_export():
    model, x = trained(ResNet18(4)).eval(), draw(2, 3, 8, 8)
    expected = model(x)
    fuse(model)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("batchnorm.normalize.default") == 20
    assert not [target for target in targets if "relu" in target or "add" in target]
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=tolerances.DOUBLE)


def test_500_layers_in_less_than_two_seconds():
    model = nn.Sequential(*(BasicBlock(2, 2) for _ in range(250)))
    start = time.process_time()
    report = fuse(model)
    assert time.process_time() - start < 2 * 5  # with tracing, and on a busy machine
    assert len(report.fused) == 500


TIMM = {
    "resnet50": (49, {"relu": 33, "add, relu": 16}),
    "resnetv2_50": (49, {"relu": 49}),
    "mobilenetv3_large_100": (41, {"hardswish": 20, "relu": 11, "add": 10}),
    "efficientnet_b0": (42, {"silu": 33, "add": 9}),
    "densenet121": (121, {"relu": 121}),
    "regnety_008": (43, {"relu": 29, "add, relu": 14}),
}


@pytest.mark.parametrize("name", TIMM)
def test_architectures_of_timm(name):
    torch.manual_seed(0)
    model = timm().create_model(name, num_classes=10)
    names, x = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    features = copy.deepcopy(model).eval().forward_features(x)
    report = fuse(model, x)
    assert len(report.fused) == TIMM[name][0], report
    kinds = list(report.fused.values())
    assert {kind: kinds.count(kind) for kind in kinds} == TIMM[name][1]
    assert report.largest_difference < 1e-9
    assert list(model.state_dict()) == names
    torch.testing.assert_close(
        model.eval().forward_features(x), features, rtol=1e-4, atol=tolerances.LIKE_TORCH
    )


def test_convnext_has_nothing_to_fuse():
    with pytest.raises(ValueError, match="ConvNeXt has no batch norm"):
        fuse(timm().create_model("convnext_tiny"), torch.zeros(1, 3, 32, 32))
