"""``batchnorm study`` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from batchnorm.cli import main
from batchnorm.records import STUDY
from batchnorm.studies.library import names

Inside = Callable[..., tuple[int, str, str]]
QUICK = ("--trials", "2", "--seeds", "2", "--jobs", "1")


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str]) -> Inside:
    """Run the command in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(("study", *arguments))
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run


def test_a_study_ends_in_verdicts_and_a_page(inside: Inside, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = inside("theorems", *QUICK, "--out", str(out))
    assert (code, stderr) == (0, "")
    assert "does not hold" in stdout
    assert f"Report: {out / 'report.html'}" in stdout.replace("\n", "")
    page = (out / "report.html").read_text()
    assert 'href="#chart-theorems-theorem-4-1"' in page
    assert 'id="chart-theorems-theorem-4-1"' in page
    code, stdout, _ = inside("theorems", *QUICK, "--out", str(out), "--json")
    document = json.loads(stdout)
    assert document["settings"]["trials"] == 2
    assert {v["verdict"] for v in document["verdicts"]} == {"holds", "does not hold"}
    assert inside("theorems", *QUICK, "--out", str(out), "--status") == (
        0,
        "theorems     4 of 4 cells done\n",
        "",
    )
    command = json.loads((out / STUDY).read_text())["command"]
    assert command.startswith("batchnorm study theorems --scale quick --seeds 2 --trials 2")
    with pytest.raises(SystemExit) as exit:
        main(("report", str(out), "--quiet", "--png", str(tmp_path / "png")))
    assert exit.value.code == 0
    assert (tmp_path / "png" / "theorem-4-1.png").is_file()
    assert (out / "report.html").read_text() == page


def test_list_names_every_study(inside: Inside) -> None:
    code, stdout, _ = inside("--list")
    assert code == 0
    assert [line.split()[0] for line in stdout.splitlines()] == names()


def test_dry_run_lists_cells_and_computes_nothing(inside: Inside, tmp_path: Path) -> None:
    code, stdout, _ = inside("theorems", *QUICK, "--out", str(tmp_path / "run"), "--dry-run")
    assert code == 0
    assert stdout.count("missing") == 4
    assert "4 cells of 4 to compute, about" in stdout
    assert not (tmp_path / "run").exists()


def test_a_settings_file_is_overruled(inside: Inside, tmp_path: Path) -> None:
    config = tmp_path / "study.toml"
    config.write_text("trials = 5\nbatch = 8\n")
    out = tmp_path / "run"
    code, stdout, _ = inside(
        "theorems", *QUICK, "--config", str(config), "--out", str(out), "--json"
    )
    assert code == 0
    assert json.loads(stdout)["settings"] == {"trials": 2, "batch": 8, "seeds": 2, "steps": 20}


@pytest.mark.parametrize(
    ("arguments", "message", "expected"),
    [
        (("theorem",), "Did you mean 'theorems'?", 2),
        (("theorems", "--trails", "3"), "Did you mean --trials?", 2),
        (("theorems", "--trials", "0"), "--trials", 2),
        (("theorems", "--jobs", "0"), "jobs=0", 2),
        (("theorems", "--cluster", "slrum"), "cluster='slrum' is unknown", 2),
        (("mnist", "--scale", "full"), "needs MNIST itself", 2),
        (("mnist", "--batch-size", "5000"), "batch_size=5000 is more than the 1438", 2),
    ],
)
def test_bad_input(
    inside: Inside,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
    expected: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = inside(*arguments)
    assert (code, stdout) == (expected, "")
    assert message in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_version_or_study_is_refused(inside: Inside, tmp_path: Path) -> None:
    document = {"format": 99, "study": "theorems"}
    (tmp_path / STUDY).write_text(json.dumps(document))
    code, _, stderr = inside("theorems", "--out", str(tmp_path))
    assert code == 1
    assert "has format 99" in stderr
    (tmp_path / STUDY).write_text(json.dumps({"format": 1, "study": "bias"}))
    code, _, stderr = inside("theorems", "--out", str(tmp_path))
    assert code == 1
    assert "holds the study 'bias', not 'theorems'" in stderr
