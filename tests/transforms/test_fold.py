"""Folded networks compute what they computed; what cannot be folded stays, with the reason."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import batchnorm
from batchnorm.transforms.convert import convert
from batchnorm.transforms.fold import fold
from batchnorm.transforms.freeze import freeze
from batchnorm.transforms.insert import insert


def trained(model):
    """Statistics, γ and β as training leaves them: none of them trivial."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.3, 3, generator=generator)
            if layer.weight is not None:
                nn.init.normal_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, generator=generator)
    return model.double().eval()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_folded(model, *example, layers=None):
    """Fold, and compare on the example and on other input; return the report."""
    before = copy.deepcopy(model)
    report = fold(model, *example)
    assert set(report.folded) == set(layers or ["1"]), report
    others = [torch.randn_like(x) for x in example]
    for inputs in (example, others):
        torch.testing.assert_close(
            model(*inputs), before(*inputs), rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE
        )
    difference = (model(*example) - before(*example)).abs().max().item()
    assert report.largest_difference == difference
    assert set(report.differences) == set(report.folded)
    assert all(0 <= d < tolerances.DOUBLE for d in report.differences.values())
    for name in report.folded:
        assert not isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)
    return report


def assert_left(model, *example, reason, layer="1"):
    before, y = copy.deepcopy(model.state_dict()), model(*example)
    modules = list(model.modules())
    report = fold(model, *example)
    assert report.folded == {}
    assert reason in report.left[layer], report.left
    assert report.largest_difference == 0
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert torch.equal(model(*example), y)


LINEAR = {
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), (2, 3, 7)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), (2, 3, 7, 6)),
    "conv3d": (nn.Conv3d(3, 4, 2, dilation=2), nn.BatchNorm3d(4), (2, 3, 5, 4, 6)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2, stride=2), nn.BatchNorm2d(4), (2, 6, 7, 6)),
    "depthwise": (nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), (2, 3, 7, 6)),
    "reflect": (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 3, 7, 6),
    ),
    "transpose1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (2, 3, 5)),
    "transpose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1, dilation=2, bias=False),
        nn.BatchNorm2d(6), (2, 4, 5, 4),
    ),
    "transpose3d": (nn.ConvTranspose3d(3, 2, 2), nn.BatchNorm3d(2), (2, 3, 4, 3, 2)),
    "linear": (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
    "linear no bias": (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), (5, 3)),
    "no affine": (nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), (5, 3)),
    "no β": (nn.Linear(3, 4), batchnorm.BatchNorm1d(4, bias=False), (5, 3)),
    "ours": (nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4, activation="silu"), (2, 3, 4, 4)),
    "Linear over axis 1 of its length": (
        nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, 1))), nn.BatchNorm1d(4), (5, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEAR)
def test_behind_every_linear_operation(case):
    linear, norm, shape = copy.deepcopy(LINEAR[case])
    assert_folded(trained(nn.Sequential(linear, norm, nn.ReLU())), draw(*shape))


FRONT = {
    "linear": (nn.BatchNorm1d(3), nn.Linear(3, 4), (5, 3)),
    "conv": (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, stride=2, bias=False), (2, 3, 7, 6)),
    "groups": (nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 7, 6)),
    "reflect": (
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 7, 6),
    ),
    "valid": (nn.BatchNorm1d(3), nn.Conv1d(3, 4, 3, padding="valid"), (2, 3, 7)),
    "same of 1": (nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1, padding="same"), (2, 3, 7)),
    "dropout": (nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.Linear(3, 4)), (5, 3)),
    "flatten": (nn.BatchNorm2d(3), nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (5, 3, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", FRONT)
def test_in_front_where_padding_allows(case):
    norm, linear, shape = copy.deepcopy(FRONT[case])
    assert_folded(trained(nn.Sequential(nn.Tanh(), norm, linear)), draw(*shape))


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), "2 pads with zeros"),
        (nn.Conv2d(3, 4, 3, padding="same"), "2 pads with zeros"),
        (nn.ConvTranspose2d(3, 4, 3), "borders not every weight reaches"),
        (nn.Linear(6, 4), "axis 1, which it normalises, is not the input axis of 2"),
    ],
    ids=str,
)
def test_not_in_front_of_what_sees_borders(linear, reason):
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), linear))
    assert_left(model, draw(2, 3, 7, 6), reason=reason)


class Written(nn.Module):
    """A forward of one's own, over the usual children, registered in the wrong order."""

    def __init__(self, forward, **more):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        for name, module in more.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def keep(m, x):
    m.kept = m.conv(x)
    return m.bn(m.kept)


REFUSED = {
    "relu between": (lambda m, x: m.bn(m.relu(m.conv(x))), "not the output of a linear operation"),
    "relu in place": (lambda m, x: m.bn(m.conv(x).relu_()), "conv goes to relu_ as well"),
    "used twice": (lambda m, x: m.bn(y := m.conv(x)) + y, "conv goes to add as well"),
    "used in a list": (
        lambda m, x: torch.cat([m.bn(y := m.conv(x)), torch.stack([y, y]).sum(0)]),
        "the output of conv goes to stack as well",
    ),
    "returned": (lambda m, x: (m.bn(y := m.conv(x)), y)[0] + 0 * y.detach(), "as well"),
    "kept": (keep, "the output of conv goes to something that keeps it as well"),
    "changed in place later": (
        lambda m, x: (y := m.conv(x), m.bn(y), y.add_(1))[1], "goes to add_ as well",
    ),
    "two inputs": (lambda m, x: m.bn(m.conv(x)) + m.bn(x), "not the output of a linear operation"),
    "weight used": (
        lambda m, x: m.bn(m.conv(x)) + m.conv.weight.sum(), "conv has a parameter or buffer that",
    ),
    "γ used": (
        lambda m, x: m.bn(m.conv(x)) + m.bn.weight.sum(), "has a parameter or buffer that",
    ),
    "conv without": (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "goes to add as well"),
    "not run": (lambda m, x: m.conv(x), "does not run"),
    "another axis": (
        lambda m, x: m.bn(m.conv(x).transpose(1, 2)), "not the output axis of conv",
    ),
    "channels mixed": (
        lambda m, x: m.bn(m.conv(x).transpose(0, 1).reshape(2, 4, 4, 4)), "not the output axis",
    ),
    "function": (
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight, padding=1)), "not the output of a linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_what_the_forward_does(case):
    forward, reason = REFUSED[case]
    assert_left(trained(Written(forward)), draw(2, 4, 4, 4), reason=reason, layer="bn")


def test_output_of_the_network():
    class Both(Written):
        def forward(self, x):
            y = self.conv(x)
            return {"features": [y], "logits": self.bn(y)}

    report = fold(trained(Both(None)), draw(2, 4, 4, 4))
    assert "conv goes to the output of the network as well" in report.left["bn"]


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2, self.bias)


class Skipping(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x


class Padded(nn.Conv2d):
    """Like timm's Conv2dSame: pads by itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Clipped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-0.1, 0.1)


class Activated(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        y = F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        )
        return self.act(self.drop(y))


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: y * 2)
    return layer


@pytest.mark.parametrize(
    ("linear", "norm", "reason"),
    [
        (Scaled(3, 4, 3), nn.BatchNorm2d(4), "0 computes its weight, or does more"),
        (Skipping(3, 3, 1), nn.BatchNorm2d(3), "0 computes its weight, or does more"),
        (
            parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
            nn.BatchNorm2d(4),
            "0 computes its weight",
        ),
        (hooked(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), "0 has a forward hook"),
        (nn.Conv2d(3, 4, 3), hooked(nn.BatchNorm2d(4)), "has a forward hook"),
        (nn.Conv2d(3, 4, 3), Clipped(4), "is a Clipped, which does more than normalise"),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), "keeps no running"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_refused_by_what_a_module_does(linear, norm, reason):
    assert_left(trained(nn.Sequential(linear, norm)), draw(2, 3, 5, 5), reason=reason)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_statistics_that_are_not(value):
    model = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model[1].running_var[2] = value
    report = fold(model, draw(5, 3))
    assert "not finite or a negative variance; recalibrate it" in report.left["1"]


def test_subclasses_whose_children_say_what_they_do():
    model = trained(nn.Sequential(Padded(3, 4, 2), Activated(4), nn.Conv2d(4, 4, 1)))
    assert_folded(model, draw(2, 3, 5, 5))
    assert isinstance(model[1][1], nn.SiLU)


@pytest.mark.parametrize("activation", batchnorm.functional.ACTIVATIONS)
def test_activations_of_the_layer_stay(activation):
    norm = batchnorm.BatchNorm2d(4, activation=activation)
    assert_folded(trained(nn.Sequential(nn.Conv2d(3, 4, 1), norm)), 4 * draw(2, 3, 5, 5))


def test_a_residual_in_the_layer_is_left():
    model = Written(lambda m, x: m.act(m.conv(x), x), act=batchnorm.BatchNorm2d(4))
    assert_left(
        trained(model), draw(2, 4, 4, 4), reason="called with more than an input", layer="act"
    )


def test_linear_of_any_rank():
    """The features are last, the channels axis 1: folded where a move makes them the same."""
    tokens = draw(5, 7, 3)
    model = Written(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(7))
    assert_left(trained(model), tokens, reason="axis 1, which it normalises, is not", layer="bn")
    for forward in (
        lambda m, x: m.bn(m.fc(x).transpose(1, 2)).transpose(1, 2),
        lambda m, x: m.bn(m.fc(x).flatten(0, 1)).reshape(5, 7, 4),
        lambda m, x: m.bn(m.fc(x).permute(0, 2, 1).contiguous()).mT,
        lambda m, x: m.bn(m.fc(x).view(-1, 4)),
    ):
        model = Written(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
        assert_folded(trained(model), tokens, layers=["bn"])


def test_shared_layers():
    twice = Written(lambda m, x: m.bn(m.conv(m.bn(m.conv(x)).relu())))
    assert assert_folded(trained(twice), draw(2, 4, 4, 4), layers=["bn"]).folded["bn"] == ("conv",)
    one_norm = Written(
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), other=nn.Conv2d(4, 4, 1, bias=False)
    )
    report = assert_folded(trained(one_norm), draw(2, 4, 4, 4), layers=["bn"])
    assert report.folded["bn"] == ("conv", "other")
    two_norms = Written(
        lambda m, x: m.bn(m.conv(x)) + m.second(m.conv(x)), second=nn.BatchNorm2d(4)
    )
    assert_left(
        trained(two_norms), draw(2, 4, 4, 4), reason="conv goes to second as well", layer="bn"
    )
    again = Written(lambda m, x: m.bn(y := m.conv(x)) + m.bn(y).relu())
    assert_folded(trained(again), draw(2, 4, 4, 4), layers=["bn"])
    norm = nn.BatchNorm1d(3)
    names = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
    assert_folded(trained(names), draw(5, 3))
    assert names[1] is names[3]


def test_tied_weights_stay_as_they_are_for_the_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    model[3].weight = model[0].weight
    assert_folded(trained(model), draw(5, 3))


def test_chains():
    """What can only be folded once its neighbour is."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    report = assert_folded(trained(model), draw(5, 3), layers=["1", "2"])
    assert report.folded == {"1": ("0",), "2": ("3",)}
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Tanh())
    report = assert_folded(trained(model), draw(5, 3), layers=["1", "2"])
    assert report.folded == {"1": ("0",), "2": ("0",)}
    model = nn.Sequential(
        nn.Tanh(), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)
    )
    assert_folded(trained(model), draw(5, 3), layers=["1", "2", "4"])


def test_several_take_the_output():
    both = Written(
        lambda m, x: m.conv(y := m.bn(x.tanh())) + m.other(y),
        conv=nn.Conv2d(4, 4, 3, padding=0),
        other=nn.Conv2d(4, 4, 3, padding=0, groups=2),
    )
    report = assert_folded(trained(both), draw(2, 4, 5, 5), layers=["bn"])
    assert report.folded["bn"] == ("conv", "other")


def test_a_residual_network_and_a_frozen_one():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu_()

    layers = [f"{block}.bn{i}" for block in range(2) for i in (1, 2)]
    model = trained(nn.Sequential(Block(), Block()))
    assert_folded(model, draw(2, 4, 5, 5), layers=layers)
    model = trained(convert(nn.Sequential(Block(), Block())))
    freeze(model)
    assert_folded(model, draw(2, 4, 5, 5), layers=layers)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_training_mode():
    model = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model[1].train()
    report = fold(model, draw(5, 3))
    assert report.left == {"1": "is in training mode; call its eval()"}
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\) first"):
        fold(model.train(), draw(5, 3))


def test_named_arguments_and_what_stays_around_it():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def forward(self, x, *, scale):
            return self.net(x) * scale

    model = trained(Masked())
    model.net[0].requires_grad_(False)
    random, x = torch.get_rng_state(), draw(5, 3)
    y = model(x, scale=2)
    assert fold(model, x, scale=2).folded == {"net.1": ("net.0",)}
    torch.testing.assert_close(model(x, scale=2), y)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(p.requires_grad for p in model.net[0].parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == ["net.0.weight", "net.0.bias"]


def test_what_rounding_spoils_is_left():
    """A mean of 3e6 standard deviations: folded, b' would cancel Wx to its last digits."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    model.append(nn.BatchNorm1d(4))
    trained(model).float()
    with torch.no_grad():
        model[0].bias.fill_(3e4)
        model[1].running_mean.fill_(3e4)
        model[1].running_var.fill_(1e-4)
    x = draw(5, 3).float()
    y = model(x)
    report = fold(model, x)
    assert list(report.folded) == ["4"]
    assert "folding it would change its output by" in report.left["1"]
    torch.testing.assert_close(model(x), y, rtol=tolerances.LIKE_TORCH, atol=tolerances.LIKE_TORCH)


def test_a_network_that_is_not_a_function_is_refused_whole():
    class Counting(nn.Module):
        count = 0

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            Counting.count += 1
            return self.net(x) + Counting.count

    model = trained(Counting())
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=r"output differs by .* though no layer's does"):
        fold(model, draw(5, 3))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_an_error_in_the_folded_network_puts_everything_back():
    model = trained(Written(lambda m, x: m.bn(m.conv(x)) * m.bn.eps))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(AttributeError, match="'Identity' object has no attribute 'eps'"):
        fold(model, draw(2, 4, 4, 4))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_an_autograd_function_that_takes_the_output_too():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    model = trained(Written(lambda m, x: m.bn(y := m.conv(x)) + Double.apply(y)))
    assert_left(model, draw(2, 4, 4, 4), reason="conv goes to", layer="bn")


def test_a_layer_called_behind_the_networks_back_is_left():
    norm = nn.BatchNorm1d(4)
    model = nn.Module()
    model.net = nn.Sequential(nn.Linear(3, 4), norm)
    model.forward = lambda x: norm(model.net[0](x))
    trained(model)
    x = draw(5, 3)
    y = model(x)
    report = fold(model, x)
    assert report.folded == {}
    assert torch.equal(model(x), y)


def test_half_precision():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).bfloat16()
    x = draw(2, 3, 5, 5).bfloat16()
    report = fold(model, x)
    assert list(report.folded) == ["1"]
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("forward", "laid_out"),
    [
        (lambda m, x: m.bn(m.conv(x)).mean((2, 3)), True),
        (lambda m, x: m.bn(m.conv(x)).mean((2, 3), keepdim=True), True),
        (lambda m, x: m.bn(m.conv(x)), False),
        (lambda m, x: m.bn(m.conv(x)).view(len(x), -1), False),
    ],
    ids=["pooled", "kept axes", "returned", "viewed"],
)
def test_channels_last_unless_it_shows(forward, laid_out):
    model, x = trained(Written(forward)).float(), draw(2, 4, 6, 6).float()
    y = model(x)
    report = fold(model, x)
    assert (list(report.folded), report.channels_last) == (["bn"], laid_out)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last) == laid_out
    assert model.conv.weight.is_contiguous() != laid_out
    assert model(x).is_contiguous()
    torch.testing.assert_close(model(x), y)


def test_channels_last_where_the_network_was():
    model = trained(Written(lambda m, x: m.bn(m.conv(x)))).float()
    x = draw(2, 4, 6, 6).float()
    assert fold(model, x.contiguous(memory_format=torch.channels_last)).channels_last


def test_inserted_norms_are_left():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    insert(model, "batch", draw(5, 3).float())
    report = fold(trained(model), draw(5, 3))
    assert report.folded == {}
    assert len(report.left) == 1


def test_a_folded_network_exports():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = draw(2, 3, 5, 5)
    y = model(x)
    fold(model, x)
    program = torch.export.export(model, (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), y)


class Deciding(nn.Module):
    def __init__(self, decide):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("flag", torch.tensor(True))
        self.decide = decide

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.decide(self, x, y) else y


@pytest.mark.parametrize(
    "decide",
    [
        lambda m, x, y: y.sum() > 0,
        lambda m, x, y: y.isfinite().all().item(),
        lambda m, x, y: int(x.argmax()) % 2 == 0,
        lambda m, x, y: not torch.equal(x, x.flip(0)),
        lambda m, x, y: x.mean().tolist() < 9,
    ],
    ids=range(5),
)
def test_a_network_that_decides_on_values_is_refused(decide):
    """Another input could take another way, on which the folded weights are wrong."""
    model = trained(nn.Sequential(Deciding(decide)))
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match=r"decides on values of its input \(test_fold.py:\d+\)"):
        fold(model, draw(2, 3, 5, 5))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_who_decides_is_named():
    class Inner(Deciding):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) if y.sum() > 0 else y

    with pytest.raises(ValueError, match=r"^1 decides on values"):
        fold(trained(nn.Sequential(nn.Tanh(), Inner(None))), draw(2, 3, 5, 5))


@pytest.mark.parametrize(
    "decide",
    [lambda m, x, y: len(x) < 9 and y.dim() == 4, lambda m, x, y: m.flag],
    ids=["shape", "own buffer"],
)
def test_other_decisions_are_the_examples(decide):
    assert_folded(trained(Deciding(decide)), draw(2, 3, 5, 5), layers=["bn"])
