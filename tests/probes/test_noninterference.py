"""Probes leave training untouched, bit for bit."""

from pathlib import Path

import pytest
import torch
from tests import tolerances
from torch import nn

from batchnorm.records import Record, Run
from batchnorm.studies.compare import compare
from batchnorm.studies.instruments import PROBES
from batchnorm.studies.models import build_arm
from batchnorm.studies.settings import CompareSettings
from batchnorm.studies.tasks import load_task
from batchnorm.studies.trainer import Trainer
from batchnorm.transforms.dataflow import preserved


class Network(nn.Module):
    """Everything that could leak: dropout, running statistics, an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(144, 20)
        self.out = nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.bn(self.conv(x)))
        return self.out(torch.relu(self.hidden(self.drop(x.flatten(1)))))


def network() -> nn.Module:
    return Network()


MODEL = f"{__name__}:network"


@pytest.mark.parametrize("model", [MODEL, "mlp", "resnet"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weights_are_bitwise_the_same_with_all_probes_and_with_none(
    tmp_path: Path, model: str, optimizer: str
) -> None:
    settings = CompareSettings(
        model=model,
        depth=1 if model == "resnet" else None,
        width=4 if model == "resnet" else None,
        optimizer=optimizer,
        lr=(0.05,),
        steps=12,
        every=3,
        seeds=1,
        weight_decay=0.01,
    )
    task = load_task("digits")
    states = []
    for names in (tuple(PROBES), ()):
        cell = settings.model_copy(update={"probes": names, "norm": ("batch",)}).cells({})[0]
        cell = cell.model_copy(update={"batch_size": 60})
        trainer = Trainer(cell, task, build_arm(cell, task), tmp_path / str(len(names)))
        assert trainer.run() == "done"
        states.append({**trainer.model.state_dict(), "random": torch.get_rng_state()})
    measured, plain = states
    assert measured.keys() == plain.keys()
    for name, value in measured.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("model", [MODEL, "mlp"])
def test_a_probe_measures_the_same_alone_and_among_others(tmp_path: Path, model: str) -> None:
    def records(names: tuple[str, ...]) -> list[Record]:
        settings = CompareSettings(
            model=model, steps=6, every=3, seeds=1, lr=(0.05,), norm=("batch",), probes=names
        )
        run, _ = compare(settings, tmp_path / "-".join(names))
        return list(run.cells[0].records)

    together = records(tuple(PROBES))
    for name in PROBES:
        alone = records((name,))
        quantities = {record.quantity for record in alone}
        assert quantities
        assert alone == [record for record in together if record.quantity in quantities], name


def test_the_input_of_a_nonlinearity_behind_batch_norm_is_normalised(tmp_path: Path) -> None:
    run, _ = compare(
        CompareSettings(steps=1, seeds=1, lr=(0.1,), norm=("batch",)), tmp_path / "run"
    )
    for layer in run.cells[0].layers[:-1]:
        mean = run.cells[0].series("activation/mean", layer)[0]
        std = run.cells[0].series("activation/std", layer)[0]
        assert abs(mean) < tolerances.SINGLE
        assert abs(std - 1) < tolerances.EPSILON


def test_layers_that_take_no_part_in_training_are_left_out(tmp_path: Path) -> None:
    run, _ = compare(
        CompareSettings(
            model="tests.studies.networks:only_in_evaluation", steps=3, seeds=1, lr=(0.1,)
        ),
        tmp_path / "run",
    )
    for cell in run.cells:
        measured = {record.layer for record in cell.records if record.quantity == "gradient/norm"}
        assert measured == {"hidden", "out"}


def test_a_probe_that_fails_leaves_the_model_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()

    def fails() -> None:
        with preserved(model):
            model.eval()
            model.bn.running_mean += 1
            torch.rand(3)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_arms_of_a_seed_share_weights() -> None:
    settings = CompareSettings(steps=1, seeds=2, lr=(0.1, 1.0), norm=("none", "batch", "layer"))
    task = load_task("digits")
    cells = settings.cells({})
    for seed in range(2):
        arms = [build_arm(cell, task).model for cell in cells if cell.seed == seed]
        weights = [[p for p in arm.parameters() if p.dim() > 1] for arm in arms]
        for other in weights[1:]:
            assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_the_first_loss_of_a_run_does_not_depend_on_the_learning_rate(tmp_path: Path) -> None:
    run, _ = compare(CompareSettings(steps=2, seeds=1, lr=(0.1, 1.0)), tmp_path / "run")
    assert isinstance(run, Run)
    first = {cell.settings["norm"]: set() for cell in run.cells}
    for cell in run.cells:
        first[cell.settings["norm"]].add(cell.series("batch/loss")[0])
    assert {norm: len(losses) for norm, losses in first.items()} == {"none": 1, "batch": 1}
