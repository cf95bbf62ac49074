"""The mixture against its formula, entropy against a step by hand, and the way back."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn

import batchnorm
from batchnorm.transforms.adapt import adapt
from batchnorm.transforms.freeze import freeze


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 4),
        batchnorm.BatchNorm1d(4), nn.Linear(4, 5),
    ).double()  # fmt: skip
    for x in draw(8, 8):
        model.train()(x - 1)
    return model.eval()


def draw(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(n, 3, generator=generator, dtype=torch.float64) + 1 for n in sizes]


def state(model):
    return copy.deepcopy(model.state_dict())


def same(model, before):
    return all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("prior", [0, 16])
def test_mixture(prior):
    model = network()
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    batches = draw(8, 4)
    before = state(model)
    adaptation = adapt(model, [(x, "label") for x in batches], prior=prior)
    assert adaptation.samples == 12
    y = model[0](torch.cat(batches))
    keep = prior / (prior + 12)
    expected = (keep * mean + (1 - keep) * y.mean(0), keep * var + (1 - keep) * y.var(0))
    torch.testing.assert_close(
        (model[1].running_mean, model[1].running_var),
        tuple(v.detach() for v in expected),
        rtol=tolerances.DOUBLE,
        atol=tolerances.DOUBLE,
    )
    adaptation.reset()
    assert same(model, before)


def test_entropy_takes_the_steps_that_adam_would_take():
    model, batches = network(), draw(8, 8)
    by_hand = copy.deepcopy(model)
    learning = [*by_hand[1].parameters(), *by_hand[5].parameters()]
    optimiser = torch.optim.Adam(learning, 0.05)
    by_hand[1].train()
    by_hand[5].train()
    entropies = []
    for x in batches:
        entropy = torch.distributions.Categorical(logits=by_hand(x)).entropy().mean()
        entropies.append(entropy.item())
        optimiser.zero_grad()
        entropy.backward()
        optimiser.step()
    before, random = state(model), torch.get_rng_state()
    model[1].weight.grad = held = torch.ones(4, dtype=torch.float64)
    adaptation = adapt(model, batches, entropy_lr=0.05)
    assert adaptation.entropies == pytest.approx(entropies)
    for i in (1, 5):
        torch.testing.assert_close(model[i].weight, by_hand[i].weight)
        torch.testing.assert_close(model[i].bias, by_hand[i].bias)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert model[1].weight.grad is held
    assert model[5].weight.grad is None
    assert torch.equal(random, torch.get_rng_state())
    adaptation.reset()
    assert same(model, before)


def test_entropy_falls():
    model, batches = network(), draw(16) * 20
    entropies = adapt(model, batches, entropy_lr=0.05).entropies
    assert entropies[-1] < 0.8 * entropies[0]


def test_frozen_layers_stay():
    model = network()
    freeze(model, "1")
    before = state(model)
    adapt(model, draw(8), entropy_lr=0.1)
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert {name.split(".")[0] for name in changed} == {"5"}
    assert changed >= {"5.weight", "5.bias", "5.running_mean", "5.running_var"}


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "the loader yielded no batch"),
        ([], {"prior": -1}, "prior must be 0 or more samples, got -1"),
        (iter(draw(8)), {"entropy_lr": 1e-3}, "can be run through only once"),
        ([*draw(8), draw(8)[0] * torch.nan], {"entropy_lr": 1e-3}, "the entropy of batch 1 is nan"),
        ([*draw(8), draw(8)[0] * torch.nan], {}, "are not finite"),
    ],
    ids=["empty", "prior", "once", "entropy", "nan"],
)
def test_failing_changes_nothing(loader, options, message):
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        adapt(model, loader, **options)
    assert same(model, before)
    assert not any(m.training for m in model.modules())


def test_what_cannot_learn_or_is_no_tensor():
    model = network()
    freeze(model, statistics=False)
    with pytest.raises(ValueError, match=r"no γ or β can learn.*unfreeze them"):
        adapt(model, draw(8), entropy_lr=1e-3)
    with pytest.raises(TypeError, match="returned a tuple; pass forward="):
        adapt(network(), draw(8), entropy_lr=1e-3, forward=lambda model, x: (model(x),))
