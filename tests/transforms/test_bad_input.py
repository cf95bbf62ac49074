"""Every verb on what it cannot handle: what, which layer, the way out; nothing changed."""

import copy

import pytest
import torch
from torch import nn

import batchnorm

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Deciding(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def network(kind=nn.Sequential, **options):
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 2)
    return kind(*layers).eval()


def not_finite():
    model = network()
    model[1].running_mean[1] = torch.nan
    return model


def no_statistics():
    return network(track_running_stats=False)


def state(model):
    return model.state_dict()


NO_DATA = "the loader yielded no batch"
NAN = r"running statistics of 1 are not finite.*recalibrate\(\)"
CASES = {
    "fold in training": (lambda: network().train(), lambda m: batchnorm.fold(m, X),
                         r"training mode.*model.eval\(\)"),
    "fold deciding": (lambda: network(Deciding), lambda m: batchnorm.fold(m, X), "decides on val"),
    "strip_bias deciding": (
        lambda: network(Deciding), lambda m: batchnorm.strip_bias(m, X), "decides on values"),
    "strip_bias not finite": (not_finite, lambda m: batchnorm.strip_bias(m, X), NAN),
    "freeze not finite": (not_finite, batchnorm.freeze, NAN),
    "freeze no statistics": (no_statistics, batchnorm.freeze, "1 has no running stat.*leave it"),
    "adapt not finite": (not_finite, lambda m: batchnorm.adapt(m, [X]), NAN),
    "adapt no statistics": (
        no_statistics, lambda m: batchnorm.adapt(m, [X]), "1 keeps no running statistics"),
    "adapt no data": (network, lambda m: batchnorm.adapt(m, []), NO_DATA),
    "adapt no tensor": (network, lambda m: batchnorm.adapt(m, ["abc"]), "a str, holds no tensor"),
    "adapt prior": (network, lambda m: batchnorm.adapt(m, [X], prior=float("inf")), "got inf"),
    "adapt lr": (network, lambda m: batchnorm.adapt(m, [X], entropy_lr=-1.0),
                 "entropy_lr must be above 0 and finite, or None, got -1.0"),
    "recalibrate no statistics": (
        no_statistics, lambda m: batchnorm.recalibrate(m, [X]), "1 keeps no running statistics"),
    "recalibrate no data": (network, lambda m: batchnorm.recalibrate(m, []), NO_DATA),
    "average not finite": (
        not_finite, lambda m: batchnorm.average(m, [state(m)], statistics="average"),
        "the average of 1.running_mean is not finite; leave out the snapshot"),
    "average no statistics": (
        no_statistics, lambda m: batchnorm.average(m, [state(m)], loader=[X]), "keeps no running"),
    "average no data": (network, lambda m: batchnorm.average(m, [state(m)], loader=[]), NO_DATA),
    "zero_gamma no block": (network, lambda m: batchnorm.zero_gamma(m, X), "no residual blocks"),
    "replace unknown": (network, lambda m: batchnorm.replace(m, "spectral", X), "got 'spectral'"),
    "parameter_groups": (network, lambda m: batchnorm.parameter_groups(m, -1), "0 or more, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_handled_is_said_and_nothing_changes(case):
    make, verb, message = CASES[case]
    model = make()
    before = copy.deepcopy(model.state_dict())
    modules, modes = list(model.modules()), [m.training for m in model.modules()]
    learning = [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        verb(model)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True
    )
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == learning
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_fold_leaves_the_layer_alone_with_the_reason():
    left = batchnorm.fold(no_statistics(), X).left
    assert left == {"1": "keeps no running statistics, so that it uses the batch"}
    assert (
        "not finite or a negative variance; recalibrate it"
        in batchnorm.fold(not_finite(), X).left["1"]
    )


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: batchnorm.recalibrate(m, [X]),
        lambda m: batchnorm.adapt(m, [X], prior=0),
        lambda m: batchnorm.average(m, [state(m)], loader=[X]),
    ],
    ids=["recalibrate", "adapt", "average"],
)
def test_measuring_anew_repairs_statistics_that_are_not_finite(verb):
    model = not_finite()
    verb(model)
    torch.testing.assert_close(model[1].running_mean, model[0](X).mean(0).detach())
