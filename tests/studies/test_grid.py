"""However the cells are computed, and however often that is killed, the records are the same."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from batchnorm.records import CELLS, RECORDS
from batchnorm.studies.grid import check_cluster
from batchnorm.studies.library import load
from batchnorm.studies.run_study import Plan, plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError

# A study that trains and one that calculates, small enough to be computed many times.
CHANGES = {
    "mnist": {"steps": 120, "every": 10, "seeds": 1, "test_limit": 50},
    "bias": {"steps": 200, "seeds": 1},
}


def plans(out: Path) -> list[Plan]:
    return [
        plan_study(study, settings_of(study, "quick", changes), out / name)
        for name, changes in CHANGES.items()
        for study in [load(name)]
    ]


def contents(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob(f"*/{CELLS}/*/{RECORDS}")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("serial")
    runs, interrupted = run_studies(plans(out), out)
    assert not interrupted
    assert all(cell.ended for run in runs for cell in run.cells)
    return contents(out)


SCRIPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.studies.test_grid import plans
from batchnorm.studies.run_study import run_studies
out = Path(sys.argv[1])
_, interrupted = run_studies(plans(out), out, workers=2, checkpoint_seconds=0.05)
sys.exit(130 if interrupted else 0)
"""


def start(out: Path) -> subprocess.Popen[bytes]:
    # Into a file: workers that outlive a killed process for a moment would hold a pipe open.
    with (out / "stderr").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)], start_new_session=True, stderr=errors
        )


def end(out: Path, process: subprocess.Popen[bytes]) -> tuple[int, str]:
    return process.wait(timeout=120), (out / "stderr").read_text()


def wait_for_growth(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Until this process has begun to write, so that what follows falls into its work."""
    size, began = sum(map(len, contents(out).values())), time.monotonic()
    while process.poll() is None and time.monotonic() - began < 60:
        if sum(map(len, contents(out).values())) != size:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("whole_group", [True, False], ids=["the group", "only the one asked"])
def test_killed_at_random_moments(
    tmp_path: Path, uninterrupted: dict[str, bytes], whole_group: bool
) -> None:
    chance, kills = random.Random(int(whole_group)), 0
    for _ in range(3 if whole_group else 1):
        process = start(tmp_path)
        wait_for_growth(tmp_path, process)
        time.sleep(chance.random() * 0.3)
        if process.poll() is None:
            kills += 1
            if whole_group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
    assert kills
    assert end(tmp_path, start(tmp_path)) == (0, "")
    assert contents(tmp_path) == uninterrupted


def test_ctrl_c_ends_every_process_and_keeps_what_is_done(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    process = start(tmp_path)
    wait_for_growth(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert end(tmp_path, process) == (130, "")
    run_studies(plans(tmp_path), tmp_path)
    assert contents(tmp_path) == uninterrupted


def test_dask_workers(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, while it starts and stops
        distributed = pytest.importorskip("distributed")
        with distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, dashboard_address=None
        ) as cluster:
            address = cluster.scheduler_address
            _, interrupted = run_studies(plans(tmp_path), tmp_path, cluster=address)
    assert not interrupted
    assert contents(tmp_path) == uninterrupted


def test_submitit(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    pytest.importorskip("submitit")
    _, interrupted = run_studies(plans(tmp_path), tmp_path, workers=2, cluster="local")
    assert not interrupted
    assert contents(tmp_path) == uninterrupted


def test_a_cluster_that_does_not_answer_is_named_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("batchnorm.studies.grid._ANSWER_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(SettingsError, match=r"cluster='tcp://127\.0\.0\.1:1' does not answer"):
        run_studies(plans(tmp_path), tmp_path, cluster="tcp://127.0.0.1:1")
    assert time.monotonic() - began < 20
    assert contents(tmp_path) == {}
    with pytest.raises(SettingsError, match="cluster='slrum' is unknown"):
        check_cluster("slrum")
