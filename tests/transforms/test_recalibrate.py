"""Population statistics against brute force, and a model that no failure changes."""

import copy

import pytest
import torch
from tests import tolerances
from torch import nn

import batchnorm
from batchnorm.transforms.freeze import freeze
from batchnorm.transforms.recalibrate import recalibrate


class Bounded(nn.BatchNorm2d):
    """Like timm's: normalises, then activates."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Network(nn.Module):
    """Reused layers, a subclass, a frozen layer, one without statistics, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.bounded = Bounded(4)
        self.ours = batchnorm.BatchNorm2d(4, activation="relu", guard=batchnorm.Guard())
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout()
        freeze(self, "frozen")

    def forward(self, x):
        x = self.bn(self.conv(x))
        x = self.bn(self.again(x.relu()))
        x = self.ours(self.bounded(x) + 1)
        return self.dropout(self.frozen(self.free(x)))


def network():
    torch.manual_seed(0)
    model = Network().double()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
    return model


def draw(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        3 * torch.randn(n, 2, 5, 5, generator=generator, dtype=dtype) + i
        for i, n in enumerate(sizes)
    ]


NAMES = ["bn", "bounded", "ours"]


def seen(model, batches):
    """Inputs of every layer, when each normalises by its batch: by hooks on plain torch."""
    model = copy.deepcopy(model)
    inputs = {name: [] for name in NAMES}
    model.eval()
    model.ours.guard = None
    for name in NAMES:
        layer = model.get_submodule(name)
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    with torch.no_grad():
        for x in batches:
            model(x)
    return inputs


def by_channel(x):
    return x.movedim(1, 0).flatten(1)


def test_pooled_moments_are_those_of_all_values_together():
    model, batches = network(), draw(8, 8, 3)
    inputs = seen(model, batches)
    report = recalibrate(model, batches)
    for name in NAMES:
        layer = model.get_submodule(name)
        values = torch.cat([by_channel(x) for x in inputs[name]], 1)
        torch.testing.assert_close(
            (layer.running_mean, layer.running_var),
            (values.mean(1), values.var(1)),
            rtol=tolerances.DOUBLE,
            atol=tolerances.DOUBLE,
        )
        assert report.values[name] == values.shape[1]
    assert report.batches == 3
    assert report.values["bn"] == 2 * 19 * 25
    assert report.left == {
        "free": "keeps no running statistics",
        "frozen": "is frozen",
        "unused": "was reached by no batch",
    }


def test_mean_is_algorithm_2():
    """With batches of one size it is the printed formula, with others each counts by its size."""
    for sizes in [(6, 6, 6), (8, 3)]:
        model, batches = network(), draw(*sizes)
        inputs = seen(model, batches)
        recalibrate(model, batches, method="mean")
        for name in NAMES:
            calls = [by_channel(x) for x in inputs[name]]
            n = [c.shape[1] for c in calls]
            mean = sum(c.mean(1) * m for c, m in zip(calls, n, strict=True)) / sum(n)
            var = sum(
                c.var(1, correction=0) * m / (m - 1) * m for c, m in zip(calls, n, strict=True)
            )
            if len(set(n)) == 1:
                m = n[0]
                printed = m / (m - 1) * torch.stack([c.var(1, correction=0) for c in calls]).mean(0)
                torch.testing.assert_close(var / sum(n), printed)
            layer = model.get_submodule(name)
            torch.testing.assert_close(
                (layer.running_mean, layer.running_var),
                (mean, var / sum(n)),
                rtol=tolerances.DOUBLE,
                atol=tolerances.DOUBLE,
            )


def test_uneven_batches_count_by_size():
    """The case in which update_bn is wrong: 64 values at 0, 2 at 5."""
    layer = nn.Sequential(nn.BatchNorm1d(1, momentum=None))
    batches = [torch.tensor([[-1.0], [1.0]]).repeat(32, 1), torch.tensor([[4.0], [6.0]])]
    torch.optim.swa_utils.update_bn(batches, layer)
    assert layer[0].running_mean.item() == 2.5
    recalibrate(layer, batches)
    assert layer[0].running_mean.item() == pytest.approx(torch.cat(batches).mean().item())
    assert layer[0].running_var.item() == pytest.approx(torch.cat(batches).var().item())


def test_nothing_else_changes():
    model = network().train()
    model.dropout.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    described, classes = repr(model), [type(m) for m in model.modules()]
    dicts = [set(vars(m)) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    buffers = dict(model.named_buffers())
    shuffled = torch.utils.data.DataLoader(torch.cat(draw(4, 4)), 4, shuffle=True)
    recalibrate(model, shuffled)
    for name, value in model.state_dict().items():
        layer, _, buffer = name.partition(".")
        changes = layer in NAMES and buffer in ("running_mean", "running_var")
        if buffer == "num_batches_tracked" and layer in NAMES:
            assert value == (4 if layer == "bn" else 2)
        else:
            assert torch.equal(value, before[name]) != changes, name
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert (described, classes) == (repr(model), [type(m) for m in model.modules()])
    assert dicts == [set(vars(m)) for m in model.modules()]
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
    assert all(buffers[name] is b for name, b in model.named_buffers())


def fail_in_loader():
    yield from draw(4, 4)
    raise KeyboardInterrupt


def interrupt(done, total):
    if done == 2:
        raise KeyboardInterrupt


BREAKS = {
    "loader": (fail_in_loader(), {}, KeyboardInterrupt, None),
    "progress": (draw(4, 4), {"progress": interrupt}, KeyboardInterrupt, None),
    "forward": ([*draw(4), torch.zeros(4, 7, 5, 5).double()], {}, RuntimeError, "channels"),
    "one value": (
        [*draw(4), torch.zeros(4, 2, 5, 5).double()[:1, :, :1, :1]],
        {},
        ValueError,
        r"bn got one value per channel \(input \(1, 4, 1, 1\)\).*drop_last",
    ),
    "nan": ([*draw(4), torch.full((4, 2, 5, 5), torch.nan).double()], {}, ValueError,
            "statistics of bn are not finite"),
    "empty": ([], {}, ValueError, "the loader yielded no batch"),
    "method": (draw(4), {"method": "median"}, ValueError, "one of pooled, mean, got 'median'"),
    "batch": ([None], {}, TypeError, "a batch is a NoneType.*pass forward="),
    "keys": ([{"image": 1}], {}, TypeError, "the batch has 'image', but Network takes x;"),
    "elsewhere": (draw(4), {"forward": lambda model, x: x}, ValueError, "no batch reached any"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_failing_leaves_the_model_as_it_was(case):
    loader, options, error, message = BREAKS[case]
    model = network().train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    described = repr(model)
    with pytest.raises(error, match=message):
        recalibrate(model, loader, **options)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert described == repr(model)
    assert all(m.training for m in model.modules())
    assert [len(m._forward_pre_hooks) for m in model.modules()].count(1) == 1  # the frozen layer
    assert torch.equal(random, torch.get_rng_state())


def test_an_interrupt_while_writing_takes_back_what_was_written(monkeypatch):
    model = network()
    before = copy.deepcopy(model.state_dict())
    copy_, calls = torch.Tensor.copy_, []

    def interrupted(self, other):
        if self is model.bounded.running_mean and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        return copy_(self, other)

    batches = draw(4)
    recalibrate(copy.deepcopy(model), batches)
    # preserved puts buffers back with copy_ as well, so the interrupt waits for the write
    from batchnorm.transforms import recalibrate as module

    write = module._write

    def then_interrupted(*args):
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
        write(*args)

    monkeypatch.setattr(module, "_write", then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches)
    assert calls
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_frozen_in_the_ways_that_torch_has():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=0.0))
    model[1].eval()
    report = recalibrate(model, [torch.randn(8, 2) + 3])
    assert list(report.values) == ["0"]
    assert set(report.left) == {"1", "2"}
    assert not model[1].running_mean.any()
    freeze(model, "0")
    with pytest.raises(
        ValueError,
        match=r"no layer to recalibrate: 0 is frozen; 1 is frozen: in .*; 2 is frozen by a mom",
    ):
        recalibrate(model, [])
    report = recalibrate(model.eval(), [torch.randn(8, 2)])  # all in evaluation: 1 is not frozen
    assert list(report.values) == ["1"]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x, shift=0):
        return self.bn(x + shift)


X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (X, None),
        ((X, "label"), None),
        ([X], None),
        ({"x": X, "label": 3}, None),
        ({"x": X - 1, "shift": torch.ones(2)}, None),
        ({"image": X}, lambda model, batch: model(batch["image"])),
        (((X - 1, 1), 0), lambda model, batch: model(*batch[0])),
    ],
    ids=["tensor", "tuple", "list", "dict", "dict of two", "forward", "nested"],
)
def test_structures_of_a_batch(batch, forward):
    model = TwoInputs()
    recalibrate(model, iter([batch]), forward=forward)
    assert model.bn.running_mean.tolist() == [2, 4]
    assert model.bn.running_var.tolist() == [2, 8]


def test_progress_and_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = batchnorm.BatchNorm1d(1)

        def forward(self, x, mask):
            return self.bn(x, mask=mask)

    model, done = Masked(), []
    x = torch.tensor([[[1.0, 3.0, 99.0]]])
    mask = torch.tensor([[True, True, False]])
    batches = [{"x": x, "mask": mask}, {"x": x + 4, "mask": mask}]
    report = recalibrate(model, batches, progress=lambda *args: done.append(args))
    assert done == [(1, 2), (2, 2)]
    assert report.values == {"bn": 4}
    assert model.bn.running_mean.item() == 4
    assert model.bn.running_var.item() == pytest.approx(20 / 3)


@pytest.mark.parametrize(
    "statistics", [batchnorm.Ghost(4), batchnorm.Renorm(schedule=None), batchnorm.Lp(2)], ids=str
)
def test_other_statistics(statistics):
    layer = batchnorm.BatchNorm1d(3, statistics=statistics)
    x = torch.randn(6, 3, dtype=torch.float64) + 2
    recalibrate(layer.double(), [x])
    square = x.square().mean(0) * 6 / 5 if isinstance(statistics, batchnorm.Lp) else x.var(0)
    torch.testing.assert_close(layer.running_var, square, rtol=tolerances.DOUBLE, atol=0)
    assert layer.statistics is statistics
    assert layer.guard is None


@pytest.mark.parametrize(
    "statistics",
    [batchnorm.Ghost(2), batchnorm.Ghost(99), batchnorm.Renorm(schedule=None)],
    ids=str,
)
def test_the_layers_behind_see_what_the_whole_batch_normalised(statistics):
    x = torch.rand(6, 3, dtype=torch.float64) ** 3 + 2
    model = nn.Sequential(batchnorm.BatchNorm1d(3, statistics=statistics), nn.Tanh())
    model.append(nn.BatchNorm1d(3)).double()
    recalibrate(model, [x])
    y = torch.tanh((x - x.mean(0)) / (x.var(0, correction=0) + model[0].eps).sqrt())
    torch.testing.assert_close(model[2].running_var, y.var(0), rtol=tolerances.DOUBLE, atol=0)


def test_low_precision_and_large_means():
    """Sums are float64 whatever the layer is: bfloat16 would stall, float32 lose the variance."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 4, generator=generator) for _ in range(20)]
    model = nn.Sequential(nn.BatchNorm1d(4)).bfloat16()
    recalibrate(model, [x.bfloat16() for x in batches])
    exact = torch.cat(batches).bfloat16().double()
    torch.testing.assert_close(
        model[0].running_var.double(), exact.var(0), rtol=tolerances.HALF, atol=0
    )
    assert model[0].running_var.dtype == torch.bfloat16
    model = nn.Sequential(nn.BatchNorm2d(4))
    shifted = [(x[..., None, None] + 1e4).to(memory_format=torch.channels_last) for x in batches]
    recalibrate(model, shifted)
    exact = torch.cat(shifted).double().flatten(1)
    torch.testing.assert_close(
        model[0].running_var.double(), exact.var(0), rtol=tolerances.SINGLE, atol=0
    )


def test_compiled_and_lazy():
    model = nn.Sequential(nn.BatchNorm1d(2))
    recalibrate(torch.compile(model, backend="eager"), [X])
    assert model[0].running_mean.tolist() == [2, 4]
    with pytest.raises(ValueError, match="0 has not seen its first input"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [X])
