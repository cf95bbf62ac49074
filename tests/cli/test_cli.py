"""The command as a user runs it; in processes of its own where that matters."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from tests.studies import networks

from batchnorm.cli import main
from batchnorm.records import RECORDS, STUDY, Run

QUICK = ["--steps", "12", "--seeds", "1", "--lr", "0.1"]
ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "batchnorm", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )


def batchnorm(*arguments: str) -> tuple[int, str, str]:
    """Run the command in a process of its own."""
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


Inside = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str]) -> Inside:
    """Run the command in this process, which saves importing torch."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("cli") / "run"
    code, stdout, stderr = batchnorm("compare", *QUICK, "--out", str(out))
    assert (code, stderr) == (0, "")
    return out, stdout


def test_compare_prints_the_result_and_where_the_report_is(run: tuple[Path, str]) -> None:
    out, stdout = run
    assert f"Report: {out / 'report.html'}" in stdout
    assert "test accuracy" in stdout
    assert (out / "report.html").stat().st_size < 3e6


def test_the_recorded_command_runs_the_same_again(run: tuple[Path, str]) -> None:
    out, _ = run
    before = (out / STUDY).read_text()
    command = json.loads(before)["command"]
    name, *arguments = command.split()
    assert name == "batchnorm"
    assert batchnorm(*arguments)[0] == 0
    assert (out / STUDY).read_text() == before


@pytest.mark.parametrize("switch", ["--lrn", "--no-lrn"])
def test_a_switch_is_recorded_as_it_is_typed(tmp_path: Path, inside: Inside, switch: str) -> None:
    out = tmp_path / "run"
    settings = ["--model", "cnn", "--width", "4", "--norm", "none", "--probes", "loss", switch]
    assert inside("compare", *QUICK, *settings, "--out", str(out))[0] == 0
    document = json.loads((out / STUDY).read_text())
    assert document["settings"]["lrn"] is (switch == "--lrn")
    arguments = document["command"].split()[1:]
    assert switch in arguments
    assert inside(*arguments)[0] == 0
    assert json.loads((out / STUDY).read_text()) == document


def test_json_is_one_document_and_quiet_is_nothing(run: tuple[Path, str], inside: Inside) -> None:
    code, stdout, stderr = inside("report", str(run[0]), "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["study"] == "compare"
    assert inside("report", str(run[0]), "--quiet") == (0, "", "")


def test_report_draws_pictures_and_exports(
    run: tuple[Path, str], tmp_path: Path, inside: Inside
) -> None:
    out, _ = run
    arguments = ("report", str(out), "--png", str(tmp_path / "png"), "--export", "parquet")
    assert inside(*arguments)[0] == 0
    assert len(list((tmp_path / "png").glob("*.png"))) > 5
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out / "records.parquet").to_pylist()
    cells = Run.read(out).cells
    assert len(table) == sum(len(cell.records) for cell in cells)
    first, record = table[0], cells[0].records[0]
    assert first == {
        "cell": cells[0].folder.name,
        "norm": "none",
        "lr": 0.1,
        "seed": 0,
        "model": "mlp",
        "step": record.step,
        "layer": record.layer,
        "quantity": record.quantity,
        "index": record.index,
        "value": record.value,
    }


def test_a_settings_file_is_overruled_by_the_command_line(tmp_path: Path, inside: Inside) -> None:
    config = tmp_path / "study.toml"
    config.write_text('lr = [0.1, 0.2]\nsteps = 5\nseeds = 1\nnorm = ["batch"]\n')
    out = tmp_path / "run"
    code, _, _ = inside("compare", "--config", str(config), "--lr", "0.3", "--out", str(out))
    assert code == 0
    settings = Run.read(out).study["settings"]
    assert (settings["lr"], settings["steps"], settings["norm"]) == ([0.3], 5, ["batch"])


def test_own_network_and_data(tmp_path: Path, inside: Inside) -> None:
    name = networks.__name__
    code, _, stderr = inside(
        "compare", "--model", f"{name}:functional", *QUICK, "--out", str(tmp_path / "run")
    )
    assert (code, stderr) == (0, "")
    run = Run.read(tmp_path / "run")
    assert any("conv1: batch norm inserted" in c for c in run.cells[1].manifest["changes"])
    assert "inserted behind it" in (tmp_path / "run" / "report.html").read_text()


def test_edited_code_is_a_new_cell(tmp_path: Path) -> None:
    script = tmp_path / "own_network_for_test.py"
    text = (
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    hashes = []
    for content in (text, text + "# edited\n"):
        script.write_text(content)
        command = (
            "import sys; from pathlib import Path;"
            "from batchnorm.studies.settings import CompareSettings;"
            "from batchnorm.studies.compare import compare;"
            "s = CompareSettings(model='own_network_for_test:net', norm=('none',), lr=(.1,),"
            "steps=2, seeds=1);"
            "print(compare(s, Path('run'))[0].cells[0].folder.name)"
        )
        result = subprocess.run(
            [sys.executable, "-B", "-c", command], cwd=tmp_path, capture_output=True, text=True
        )
        hashes.append(result.stdout.strip())
    assert len(set(hashes)) == 2
    assert all(hashes)


def test_ctrl_c_keeps_what_is_done_writes_the_report_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("compare", "--steps", "400", "--seeds", "1", "--lr", "1", "--out", str(out))
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.glob(f"cells/*/{RECORDS}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from here" in stderr
    assert (out / "report.html").is_file()
    assert Run.read(out).cells[-1].manifest["state"] == "interrupted"
    assert batchnorm(*arguments)[0] == 0
    assert {cell.manifest["state"] for cell in Run.read(out).cells} == {"done"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digit"], "Did you mean 'digits'?"),
        (["--model", "mpl"], "Did you mean 'mlp'?"),
        (["--norm", "none,bach"], "Did you mean 'batch'?"),
        (["--probes", "shifts"], "Did you mean 'shift'?"),
        (["--stepps", "3"], "Did you mean --steps?"),
        (["--lr", "0.1,-1"], "must be a finite number above 0, not -1.0"),
        (["--lr", "nan"], "must be a finite number above 0, not nan"),
        (["--weight-decay", "inf"], "must be a finite number of at least 0, not inf"),
        (["--batch-size", "5000"], "more than the 1438 training examples"),
        (["--batch-size", "1"], "greater than or equal to 2"),
        (["--landscape-range", "4,1"], "must be two rising numbers"),
        (["--config", "no-such-file.toml"], "No such file"),
        (["--model", "vgg"], "takes images of at least 32×32"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, inside: Inside, arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = inside("compare", *arguments, "--out", str(out))
    assert (code, stdout) == (2, "")
    assert stderr.startswith("batchnorm: ")
    assert message in stderr
    assert not out.exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path, inside: Inside) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, stderr = inside("compare", *QUICK, "--out", str(tmp_path))
    assert code == 1
    assert "nothing in it was touched" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, inside: Inside) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, _, stderr = inside("compare", *QUICK, "--out", str(out))
        assert code == 1
        assert "--out" in stderr


def test_a_folder_that_another_process_writes(tmp_path: Path, inside: Inside) -> None:
    with filelock.FileLock(tmp_path / ".lock"):
        (tmp_path / STUDY).write_text('{"format": 1, "cells": []}')
        code, _, stderr = inside("compare", *QUICK, "--out", str(tmp_path))
    assert code == 1
    assert "being written by another process" in stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no study.json"), ("{", "not readable JSON"), ('{"format": 99}', "format 99")],
)
def test_report_of_what_is_not_a_run(
    tmp_path: Path, content: str | None, message: str, inside: Inside
) -> None:
    if content is not None:
        (tmp_path / STUDY).write_text(content)
    code, _, stderr = inside("report", str(tmp_path))
    assert code == 1
    assert message in stderr


def test_info_names_versions_and_kernels(inside: Inside) -> None:
    code, stdout, _ = inside("info", "--json")
    assert code == 0
    document = json.loads(stdout)
    assert {"batchnorm", "torch", "kernels", "threads"} <= document.keys()
    code, stdout, _ = inside("info")
    assert "kernels" in stdout


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys\nfrom batchnorm.cli import main\n"
        "try: main(['compare', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--lr" in result.stdout
