"""Batch norm behind the nonlinearity, against the formula."""

import pytest
import torch
from tests import tolerances

from batchnorm.probes import find_layers
from batchnorm.studies.models import build_arm
from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.studies.tasks import load_task
from batchnorm.studies.training import check_cells

DIGITS = load_task("digits")


def network(**changes):
    cell = CellSettings(**{"norm": "batch", "lr": 0.1, "seed": 0, "batch_size": 60, **changes})
    return build_arm(cell, DIGITS).model


def normalized(z: torch.Tensor, *over: int) -> torch.Tensor:
    mean, var = z.mean(over, keepdim=True), z.var(over, keepdim=True, correction=0)
    return (z - mean) / (var + 1e-5).sqrt()


@torch.no_grad()
def test_mlp_behind_is_bn_of_g_of_wu_plus_b() -> None:
    model = network(placement="after", depth=2, width=8).double().train()
    values = dict(model.named_parameters())
    for name in ("hidden1.bias", "hidden2.bias"):
        values[name].normal_()  # it begins at zero, as all biases do
    u = x = DIGITS.train.x[:50].double()
    u = u.flatten(1)
    for name in ("hidden1", "hidden2"):
        u = normalized(torch.sigmoid(u @ values[f"{name}.weight"].T + values[f"{name}.bias"]), 0)
    expected = u @ values["output.weight"].T + values["output.bias"]
    torch.testing.assert_close(model(x), expected, rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE)


@torch.no_grad()
def test_cnn_behind_normalizes_over_positions_too() -> None:
    model = network(model="cnn", placement="after", depth=1, width=3).double().train()
    x = DIGITS.train.x[:20].double()
    z = torch.relu(torch.nn.functional.conv2d(x, model.conv1.weight, padding=1))
    expected = model.output(normalized(z, 0, 2, 3).mean((2, 3)))
    torch.testing.assert_close(model(x), expected, rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_weights_and_names_are_those_of_the_usual_place(model: str) -> None:
    before, after = (dict(network(model=model, placement=p).state_dict()) for p in (None, "after"))
    biases = after.keys() - before.keys()
    assert biases == {
        f"{n.removesuffix('.weight')}.bias" for n in before if before[n].dim() > 1
    } - {"output.bias"}
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    explicit = network(model=model, placement="before").state_dict()
    assert list(explicit) == list(before)


def test_the_nonlinearity_is_seen_to_receive_what_the_linear_operation_gives() -> None:
    model = network(placement="after")
    for layer in find_layers(model, DIGITS.train.x[:2]):
        assert layer.site is model.get_submodule(layer.name)


def test_where_norms_cannot_be_moved() -> None:
    own = "tests.studies.networks:functional"
    for model, message in (
        ("resnet", "norms of model='resnet' cannot be moved"),
        (own, "placement='after' is for the built-in networks"),
    ):
        with pytest.raises(SettingsError, match=message):
            network(model=model, placement="after")


def test_the_default_is_no_new_cell() -> None:
    cell = CellSettings(norm="batch", lr=0.1, seed=0)
    assert "placement" not in cell.document()
    check_cells([cell.model_copy(update={"placement": "after"})])
