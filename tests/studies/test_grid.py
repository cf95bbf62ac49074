"""However the cells are computed, and however often that is killed, the records are the same."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed
import pytest

from batchnorm.records import CELLS, RECORDS
from batchnorm.studies.grid import check_cluster
from batchnorm.studies.library import load
from batchnorm.studies.run_study import Plan, plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds; what is waited for takes a few on an idle machine


def plans(out: Path) -> list[Plan]:
    # Two cells, without a trainer: what a process has to import is most of what these tests cost.
    study = load("theorems")
    return [plan_study(study, settings_of(study, "quick", {"seeds": 1, "trials": 30}), out)]


def contents(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob(f"{CELLS}/*/{RECORDS}")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("serial")
    (run,), interrupted = run_studies(plans(out), out)
    assert not interrupted
    assert [cell.ended for cell in run.cells] == [True, True]
    return contents(out)


SCRIPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.studies.test_grid import plans
from batchnorm.studies.run_study import run_studies
out = Path(sys.argv[1])
_, interrupted = run_studies(plans(out), out, workers=2, checkpoint_seconds=0.05)
sys.exit(130 if interrupted else 0)
"""


def start(out: Path, errors: Path) -> subprocess.Popen[bytes]:
    # Into a file: workers that outlive a killed process for a moment would hold a pipe open.
    with errors.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(out)], start_new_session=True, stderr=file
        )


def wait_for_growth(out: Path, process: subprocess.Popen[bytes], size: int) -> None:
    """Until this process has written ``size`` bytes, so that what follows falls into its work."""

    def now() -> int:
        return sum(map(len, contents(out).values()))

    before, began = now(), time.monotonic()
    while now() < before + size:
        assert process.poll() is None, "it has ended, and was to be interrupted"
        assert time.monotonic() - began < PATIENCE, "it does not write"
        time.sleep(0.005)


def test_killed_at_random_moments(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    out, errors = tmp_path / "run", tmp_path / "errors"
    chance, size = random.Random(0), sum(map(len, uninterrupted.values()))
    for whole_group in (True, False):  # without its parent, a worker has to end by itself
        process = start(out, tmp_path / f"killed-{whole_group}")
        wait_for_growth(out, process, round(size * chance.uniform(0.02, 0.3)))
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        assert contents(out) != uninterrupted
    assert start(out, errors).wait(PATIENCE) == 0
    assert errors.read_text() == ""
    assert contents(out) == uninterrupted


def test_ctrl_c_ends_every_process_and_keeps_what_is_done(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    out, errors = tmp_path / "run", tmp_path / "errors"
    process = start(out, errors)
    wait_for_growth(out, process, 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(PATIENCE) == 130
    assert errors.read_text() == ""
    assert contents(out) != uninterrupted
    run_studies(plans(out), out)
    assert contents(out) == uninterrupted


@pytest.mark.filterwarnings("ignore")  # Dask's own, while it starts and stops
def test_dask_workers(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        _, interrupted = run_studies(plans(tmp_path), tmp_path, cluster=address)
        with distributed.Client(cluster) as client:  # each cell went to a worker of its own
            held = client.run(lambda: "batchnorm.studies.library.theorems" in sys.modules)
    assert not interrupted
    assert list(held.values()) == [True, True]
    assert contents(tmp_path) == uninterrupted


def test_submitit(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    _, interrupted = run_studies(plans(tmp_path), tmp_path, cluster="local")
    assert not interrupted
    assert contents(tmp_path) == uninterrupted


def test_a_cluster_that_does_not_answer_is_named_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.studies.grid._ANSWER_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(SettingsError, match=r"cluster='tcp://127\.0\.0\.1:1' does not answer"):
        run_studies(plans(tmp_path), tmp_path, cluster="tcp://127.0.0.1:1")
    assert time.monotonic() - began < 20
    assert contents(tmp_path) == {}
    with pytest.raises(SettingsError, match="cluster='slrum' is unknown"):
        check_cluster("slrum")
