"""Training a cell with measurements that no setting names."""

from collections.abc import Iterator
from pathlib import Path

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
