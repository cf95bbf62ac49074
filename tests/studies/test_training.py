"""Training a cell with measurements that no setting names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import tolerances

from batchnorm.probes import Probe, Step
from batchnorm.records import RECORDS, Record, read_records
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.settings import CellSettings
from batchnorm.studies.training import train


class Count(Probe):
    name = "count"
    every = 2

    def after_update(self, step: Step) -> Iterator[Record]:
        yield Record(step.number, "", "count", 1.0)


def test_extra_probes_measure_beside_those_of_the_settings(tmp_path: Path) -> None:
    cell = CellSettings(norm="batch", lr=0.1, seed=0, steps=5, width=4, probes=("performance",))

    def records(name: str, **extra: object) -> list[Record]:
        train(cell, CellRun(cell, tmp_path / name), **extra)
        return list(read_records(tmp_path / name / RECORDS))

    def count(settings: CellSettings, layers: list[object]) -> list[Probe]:
        assert settings == cell
        assert layers
        return [Count()]

    found = records("extra", extra=count)
    assert {r.step for r in found if r.quantity == "count"} == {0, 2, 4}
    assert [r for r in found if r.quantity != "count"] == records("plain")


class Moves(Probe):
    """How far the weights of the output moved, by the gradient."""

    name = "moves"
    every = 1

    def after_update(self, step: Step) -> Iterator[Record]:
        name = "output.weight"
        moved = step.parameters[name] - step.updated[name]
        share = moved.norm() / step.gradients[name].norm()
        yield Record(step.number, "", "moved", float(share))
        yield Record(step.number, "", "rate", step.lr)


def test_the_learning_rate_halves(tmp_path: Path) -> None:
    cell = CellSettings(
        norm="none", lr=0.8, seed=0, steps=21, width=4, probes=("loss",), lr_halving=10.0
    )
    train(cell, CellRun(cell, tmp_path), extra=lambda settings, layers: [Moves()])
    records = list(read_records(tmp_path / RECORDS))
    for quantity in ("moved", "rate"):
        found = {r.step: r.value for r in records if r.quantity == quantity}
        assert [found[0], found[10], found[20]] == pytest.approx(
            [0.8, 0.4, 0.2], rel=tolerances.SINGLE
        )
        assert found[5] == pytest.approx(0.8 / 2**0.5, rel=tolerances.SINGLE)


def test_probes_see_the_distorted_images_and_every_arm_the_same(tmp_path: Path) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    class Images(Probe):
        name = "images"
        every = 1

        def __init__(self, arm: str) -> None:
            self.arm = arm

        def before_update(self, step: Step) -> Iterator[Record]:
            seen.setdefault(self.arm, []).append(step.x)
            yield from ()

    for arm, norm, distortion in (("a", "none", 0.3), ("b", "batch", 0.3), ("c", "none", None)):
        cell = CellSettings(
            norm=norm, lr=0.1, seed=0, steps=3, width=4, probes=("loss",), distortion=distortion
        )
        extra = lambda settings, layers, arm=arm: [Images(arm)]  # noqa: E731
        train(cell, CellRun(cell, tmp_path / arm), extra=extra)
    assert all(map(torch.equal, seen["a"], seen["b"]))
    assert not any(map(torch.equal, seen["a"], seen["c"]))


def test_later_settings_leave_the_hash_of_earlier_cells(tmp_path: Path) -> None:
    later = {"init_std", "dropout", "lrn", "lr_halving", "shuffle", "distortion"}
    cell = CellSettings(norm="none", lr=0.1, seed=0)
    assert not later & set(cell.document())
    assert cell.model_copy(update={"lrn": True}).document() == cell.document() | {"lrn": True}
