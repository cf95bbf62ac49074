from dataclasses import replace

import pytest
import torch
from tests import tolerances
from torch import nn

from batchnorm.probes import find_layers
from batchnorm.studies.models import MODELS, build_arm
from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.studies.tasks import Task, load_task

HERE = "tests.studies.networks"


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits")


def settings(**changes: object) -> CellSettings:
    return CellSettings(**{"norm": "batch", "lr": 0.1, "seed": 0, "batch_size": 60, **changes})


def image_task(size: int) -> Task:
    from batchnorm.studies.examples import Examples

    part = Examples(torch.randn(4, 3, size, size, generator=torch.manual_seed(0)), torch.arange(4))
    return Task("images", part, part, "classification", 10)


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_with_every_norm(name: str, norm: str) -> None:
    task = image_task(32)
    model = build_arm(settings(model=name, norm=norm, width=16), task).model
    loss = task.loss(model(task.train.x), task.train.y)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert bool(batch_norms) == (norm == "batch")


@pytest.mark.parametrize(("name", "layers"), [("mlp", 4), ("linear", 25), ("vgg", 14), ("cnn", 5)])
def test_depths(name: str, layers: int) -> None:
    task = image_task(32)
    found = find_layers(build_arm(settings(model=name), task).model, task.train.x)
    assert len(found) == layers


def test_resnet_has_twenty_layers_and_its_shortcuts() -> None:
    task = image_task(32)
    found = find_layers(build_arm(settings(model="resnet"), task).model, task.train.x)
    assert len(found) == 20 + 2


@pytest.mark.parametrize("norm", ["none", "batch", "noisy", "noise", "l1", "weight"])
@pytest.mark.parametrize("name", ["cnn", "vgg", "resnet"])
def test_activations_lie_channels_last(name: str, norm: str) -> None:
    task = image_task(32)
    model = build_arm(settings(model=name, norm=norm, width=8), task).model
    seen = []
    for layer in find_layers(model, task.train.x)[:-1]:
        convolution = model.get_submodule(layer.name)
        convolution.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(task.train.x)
    assert len(seen) > 3
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)


def test_the_default_mlp_is_the_papers() -> None:
    model = build_arm(settings(norm="none"), load_task("digits")).model
    widths = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert widths == [100, 100, 100, 10]
    assert sum(isinstance(m, nn.Sigmoid) for m in model.modules()) == 3


def test_init_scale_multiplies_weights(digits: Task) -> None:
    one = build_arm(settings(), digits).model
    ten = build_arm(settings(init_scale=10.0), digits).model
    for a, b in zip(one.parameters(), ten.parameters(), strict=True):
        assert torch.equal(a * 10, b) if a.dim() > 1 else torch.equal(a, b)


def test_layers_have_the_same_names_in_both_arms(digits: Task) -> None:
    for name in ("mlp", "cnn", f"{HERE}:functional", f"{HERE}:normalized"):
        arms = [build_arm(settings(model=name, norm=n), digits).model for n in ("none", "batch")]
        names = [[layer.name for layer in find_layers(arm, digits.train.x[:2])] for arm in arms]
        assert names[0] == names[1]


def test_batch_norm_goes_before_each_nonlinearity(digits: Task) -> None:
    arm = build_arm(settings(model=f"{HERE}:functional"), digits)
    assert [change.split(":")[0] for change in arm.changes] == ["conv1", "conv2", "fc1"]
    assert all("redundant bias dropped" in change for change in arm.changes)
    x = digits.train.x[:30]
    seen: dict[str, torch.Tensor] = {}
    for name in ("conv1", "conv2", "fc1", "fc2"):
        arm.model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: seen.__setitem__(name, o.detach().clone())
        )
    arm.model.train()(x)
    for name in ("conv1", "conv2", "fc1"):
        axes = [d for d in range(seen[name].dim()) if d != 1]
        assert seen[name].mean(axes).abs().max() < tolerances.SINGLE
        assert (seen[name].var(axes, correction=0) - 1).abs().max() < tolerances.EPSILON
    assert seen["fc2"].mean(0).abs().max() > 0.01


def test_inserted_norm_survives_a_copy_and_keeps_names(digits: Task) -> None:
    import copy

    plain = build_arm(settings(model=f"{HERE}:functional", norm="none"), digits).model
    model = build_arm(settings(model=f"{HERE}:functional"), digits).model
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.conv1.batchnorm_inserted.bias += 1
    x = digits.train.x[:9]
    assert not torch.equal(clone(x), model(x))
    kept = {n for n, _ in plain.named_parameters()} - {n for n, _ in model.named_parameters()}
    assert kept == {"conv1.bias", "conv2.bias", "fc1.bias"}


def test_batch_norm_is_taken_out_and_the_bias_comes_back(digits: Task) -> None:
    arm = build_arm(settings(model=f"{HERE}:normalized", norm="none"), digits)
    assert arm.changes == [
        "1: BatchNorm2d replaced by identity, bias of 0 restored",
        "5: BatchNorm1d replaced by identity",
    ]
    assert arm.model[0].bias is not None
    assert not arm.model[0].bias.any()
    assert isinstance(arm.model[1], nn.Identity)


def test_a_network_that_is_as_the_arm_wants_it_is_not_changed(digits: Task) -> None:
    assert build_arm(settings(model=f"{HERE}:normalized"), digits).changes == []
    assert build_arm(settings(model=f"{HERE}:functional", norm="none"), digits).changes == []


def test_a_callable_that_takes_norm_builds_each_arm(digits: Task) -> None:
    arms = [
        build_arm(settings(model=f"{HERE}:takes_norm", norm=norm), digits)
        for norm in ("none", "batch")
    ]
    assert isinstance(arms[1].model[2], nn.BatchNorm1d)
    assert torch.equal(arms[0].model[1].weight, arms[1].model[1].weight)
    assert torch.equal(arms[0].model[4].bias, arms[1].model[4].bias)
    assert "4 parameters start as" in arms[1].changes[0]


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_additions_change_neither_the_weights_nor_their_names(name: str, digits: Task) -> None:
    added = {"dropout": 0.5} | ({} if name == "mlp" else {"lrn": True})
    plain = build_arm(settings(model=name), digits).model.state_dict()
    model = build_arm(settings(model=name, **added), digits).model
    assert list(plain) == list(model.state_dict())
    assert all(torch.equal(plain[key], value) for key, value in model.state_dict().items())
    layers = [layer.name for layer in find_layers(model, digits.train.x[:2])]
    assert layers == [n.removesuffix(".weight") for n in plain if plain[n].dim() > 1]


def inputs_of(model: nn.Module, kind: type[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].detach()))
    model(x)
    return seen


@pytest.mark.parametrize(("name", "places"), [("mlp", 3), ("cnn", 1), ("resnet", 1), ("vgg", 1)])
def test_dropout_is_before_the_output_or_behind_every_hidden_layer(name: str, places: int) -> None:
    task = image_task(32)
    x = torch.rand(40, 3, 32, 32, generator=torch.manual_seed(0))
    model = build_arm(settings(model=name, activation="sigmoid", dropout=0.25), task).model
    torch.manual_seed(0)
    dropped = [float((x == 0).float().mean()) for x in inputs_of(model.train(), nn.Linear, x)]
    # No sigmoid is zero; the least are 40 x 16 of them, three standard errors of 0.017.
    assert dropped[-places:] == pytest.approx([0.25] * places, abs=0.052)
    assert not any(dropped[:-places])
    assert all((x != 0).all() for x in inputs_of(model.eval(), nn.Linear, x))


def test_local_response_normalisation_is_behind_the_nonlinearity() -> None:
    task = image_task(8)
    plain, normed = (
        build_arm(settings(model="cnn", norm="none", width=7, lrn=lrn), task).model.eval()
        for lrn in (None, True)
    )
    x = 100 * task.train.x
    before, after = (inputs_of(model, nn.Conv2d, x)[1] for model in (plain, normed))
    expected = before.clone()
    for c in range(7):
        near = before[:, max(0, c - 2) : c + 3].square().sum(1)
        expected[:, c] /= (1 + 1e-4 / 5 * near) ** 0.75
    assert (expected / before).nan_to_num(1).min() < 0.9  # so that there is something to see
    assert torch.allclose(after, expected, rtol=tolerances.SINGLE)


@pytest.mark.parametrize("channels", [2, 5, 16])
def test_local_response_normalisation_is_torchs(channels: int) -> None:
    plain = build_arm(settings(model="cnn", lrn=True), image_task(8)).model
    ours = next(m for m in plain.modules() if isinstance(m, nn.LocalResponseNorm))
    x, gradient = 100 * torch.randn(2, 3, channels, 4, 4, dtype=torch.float64)
    x.requires_grad_()
    y, expected = ours(x), nn.LocalResponseNorm(ours.size)(x)
    assert torch.allclose(y, expected, rtol=tolerances.DOUBLE)
    dx, expected_dx = (torch.autograd.grad(out, x, gradient)[0] for out in (y, expected))
    assert torch.allclose(dx, expected_dx, rtol=tolerances.DOUBLE)


def test_the_sum_of_a_residual_block_is_normalised_behind_its_nonlinearity() -> None:
    model = build_arm(settings(model="resnet", depth=1, lrn=True), image_task(8)).model
    normed = [n for n, m in model.named_modules() if isinstance(m, nn.LocalResponseNorm)]
    assert len(normed) == 1 + 3 * 2
    assert not any("conv2" in name for name in normed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mlp", "lrn": True}, r"model='mlp' has no channels.*Choose model cnn"),
        (
            {"model": "cnn", "activation": "identity", "lrn": True},
            r"lrn=True: with activation='identity' there are no responses.*Choose relu",
        ),
        ({"model": f"{HERE}:functional", "lrn": True}, r"lrn=True is for the built-in networks"),
        ({"model": f"{HERE}:functional", "dropout": 0.5}, r"dropout=0.5 is for the built-in"),
        ({"model": "vggg"}, r"model='vggg' is unknown\. Did you mean 'vgg'\?.*module:callable"),
        ({"norm": "bach"}, r"norm='bach' is unknown\. Did you mean 'batch'\?"),
        ({"model": "vgg"}, r"images of at least 32×32.*1×8×8.*Choose model mlp or cnn"),
        ({"model": f"{HERE}:missing"}, r"has no 'missing'"),
        ({"model": "no_such_module:f"}, r"importing 'no_such_module' failed"),
        ({"model": f"{HERE}:constant"}, r"is a int, not something to call"),
        ({"model": f"{HERE}:raises"}, r"raised RuntimeError: no network today"),
        ({"model": f"{HERE}:not_a_module"}, r"returned a int, not a torch\.nn\.Module"),
        ({"model": f"{HERE}:wrong_output"}, r"gives \(2, 7\).*needs a tensor of shape \(2, 10\)"),
        ({"model": f"{HERE}:wrong_input"}, r"fails on a batch of shape \(2, 1, 8, 8\)"),
        ({"model": f"{HERE}:activated", "norm": "none"}, r"1 is a Activated, which may do more"),
        ({"model": f"{HERE}:reuses"}, r"layer: used more than once"),
        ({"model": f"{HERE}:functional", "depth": 3}, r"depth=3 is for the built-in networks"),
    ],
)
def test_what_cannot_be_built_is_named(
    digits: Task, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        build_arm(settings(**changes), digits)


def test_unknown_depth_of_vgg() -> None:
    with pytest.raises(SettingsError, match="choose 13 or 16"):
        build_arm(settings(model="vgg", depth=11), image_task(32))


@pytest.mark.parametrize("name", ["mlp", "cnn", f"{HERE}:functional", f"{HERE}:normalized"])
def test_frozen_statistics_are_measured_over_the_data_and_stay(digits: Task, name: str) -> None:
    few = replace(digits, train=digits.train.subset(200, seed=0))
    model = build_arm(settings(model=name, norm="frozen"), few).model.train()
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, _, y: outputs.append(y.detach().clone()))
    before = [layer.running_mean.clone() for layer in layers]
    model(few.train.x)
    assert all(torch.equal(m.running_mean, b) for m, b in zip(layers, before, strict=True))
    for y in outputs:
        values = y.transpose(0, 1).flatten(1)
        assert (values.mean(1).abs() < tolerances.MEASURED).all()
        assert torch.allclose(values.var(1), torch.ones(()), atol=tolerances.MEASURED)


def test_ghosts_are_batch_norm_of_parts(digits: Task) -> None:
    x = digits.train.x[:8]
    batch, ghost = (build_arm(settings(norm=n), digits).model.train() for n in ("batch", "ghost4"))
    parts = torch.cat([batch(part) for part in x.split(4)])
    assert torch.allclose(ghost(x), parts, atol=tolerances.LIKE_TORCH)
