"""A run that was stopped, however, ends as if it had not been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batchnorm.records import CELLS, RECORDS, RecordError, Run
from batchnorm.studies.checkpoint import CHECKPOINT
from batchnorm.studies.compare import compare, plan
from batchnorm.studies.models import build_arm
from batchnorm.studies.settings import CompareSettings
from batchnorm.studies.trainer import Trainer

SETTINGS = CompareSettings(steps=60, every=7, seeds=1, lr=(0.5,), optimizer="momentum")


def contents(out: Path) -> dict[str, bytes]:
    paths = sorted(out.glob(f"{CELLS}/*/{RECORDS}"))
    return {path.parent.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("plain") / "run"
    compare(SETTINGS, out)
    return contents(out)


EVERYTHING_ELSE: dict[str, Any] = {
    "model": "cnn",
    "width": 6,
    "dropout": 0.3,
    "lrn": True,
    "lr_halving": 20.0,
    "shuffle": "once",
    "distortion": 0.3,
    "train_limit": 300,
    "batch_size": 30,
}
"""Epochs of 10 steps."""


@pytest.mark.parametrize("changes", [{}, EVERYTHING_ELSE], ids=["default", "everything else"])
def test_stopping_after_any_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    task, cells = plan(SETTINGS.model_copy(update=changes))
    cell = cells[1]
    plain = Trainer(cell, task, build_arm(cell, task), tmp_path / "plain")
    plain.run()
    expected = (tmp_path / "plain" / RECORDS).read_bytes()
    stops = 0
    while True:
        trainer = Trainer(cell, task, build_arm(cell, task), tmp_path / "stopped")
        until = trainer.step + 1 + stops % 4
        state = trainer.run(stop=lambda trainer=trainer, until=until: trainer.step >= until)
        if state == "done":
            break
        stops += 1
    assert stops > 10
    assert (tmp_path / "stopped" / RECORDS).read_bytes() == expected
    assert not (tmp_path / "stopped" / CHECKPOINT).exists()


SCRIPT = """
import sys
from pathlib import Path
from batchnorm.studies.checkpoint import CHECKPOINT
from batchnorm.studies.compare import compare
from batchnorm.studies.settings import CompareSettings
settings = CompareSettings.model_validate_json(sys.argv[1])
compare(settings, Path(sys.argv[2]), checkpoint_seconds=0.05)
"""


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, SETTINGS.model_dump_json(exclude_unset=True), str(out)],
        stderr=subprocess.DEVNULL,
    )


def test_killed_at_random_moments(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    out, chance = tmp_path / "run", random.Random(0)
    kills = 0
    for _ in range(4):
        process = start(out)
        # Wait until this process has begun to write, so that the kill falls into the training.
        began = time.monotonic()
        size = sum(map(len, contents(out).values()))
        while process.poll() is None and time.monotonic() - began < 60:
            if sum(map(len, contents(out).values())) != size:
                break
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills
    assert start(out).wait() == 0
    assert contents(out) == uninterrupted


def test_a_request_to_stop_keeps_what_is_done(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    out = tmp_path / "run"

    class StopSoon:
        done = 0

        def start(self, cells: int, steps: int) -> None: ...
        def cell(self, settings: object) -> None: ...
        def advance(self, steps: int) -> None:
            self.done += steps
            if self.done == 80:
                os.kill(os.getpid(), signal.SIGINT)

    run, interrupted = compare(SETTINGS, out, listener=StopSoon())
    assert interrupted
    assert [cell.manifest["state"] for cell in run.cells] == ["done", "interrupted"]
    run, interrupted = compare(SETTINGS, out)
    assert not interrupted
    assert contents(out) == uninterrupted


def test_finished_cells_are_not_computed_again_and_new_ones_join(tmp_path: Path) -> None:
    out = tmp_path / "run"
    compare(SETTINGS, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"{CELLS}/*/{RECORDS}")}
    run, _ = compare(SETTINGS.model_copy(update={"seeds": 2}), out)
    assert len(run.cells) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_damaged_checkpoint_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    task, cells = plan(SETTINGS)
    folder = tmp_path / "cell"
    trainer = Trainer(cells[0], task, build_arm(cells[0], task), folder)
    trainer.run(stop=lambda: trainer.step == 5)
    records = (folder / RECORDS).read_bytes()
    (folder / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(RecordError, match=r"checkpoint\.pt cannot be read.*Remove the folder"):
        Trainer(cells[0], task, build_arm(cells[0], task), folder)
    assert (folder / RECORDS).read_bytes() == records


def test_damaged_records_are_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run, _ = compare(SETTINGS, out)
    path = run.cells[0].folder / RECORDS
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(RecordError, match=r"records\.jsonl, line 1 is not a record"):
        Run.read(out)


def test_divergence_is_a_result(tmp_path: Path) -> None:
    settings = CompareSettings(
        model="mlp", activation="relu", steps=40, seeds=1, lr=(1e20,), norm=("none",)
    )
    run, interrupted = compare(settings, tmp_path / "run")
    assert not interrupted
    (cell,) = run.cells
    assert cell.manifest["state"] == "diverged"
    losses = cell.series("batch/loss")
    assert max(losses) == cell.manifest["step"]
    assert not losses[cell.manifest["step"]] < float("inf")
