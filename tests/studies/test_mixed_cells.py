"""A study some of whose cells train networks while others calculate."""

import re
from pathlib import Path

import pytest
from pydantic import Field

from batchnorm.cli import study as commands
from batchnorm.records import Record, Run
from batchnorm.report.charts import performance
from batchnorm.report.grid import Grid
from batchnorm.report.spec import Chart
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.run_study import Plan, plan_study, run_studies
from batchnorm.studies.settings import CellBase, CellSettings
from batchnorm.studies.study import Study, TrainingStudySettings, train, training_cells
from batchnorm.verdicts import Above, Claim


class Settings(TrainingStudySettings):
    """Small."""


class Sum(CellBase):
    """The sum of 1 … n, in n steps."""

    n: int
    task: str = "digits"
    code: dict[str, str] = Field(default={})


def cells(settings: Settings) -> list[CellBase]:
    sums = [Sum(seed=seed, n=4, task=settings.task) for seed in range(settings.seeds)]
    return [*sums, *training_cells(settings, lr=[0.1])]


def compute(cell: CellBase, at: CellRun) -> None:
    if isinstance(cell, CellSettings):
        return train(cell, at)
    for step in at.steps(4):
        at.state["sum"] = at.state.get("sum", 0) + step + 1
        at.write([Record(step, "", "sum", at.state["sum"])])
    return None


def figures(run: Run) -> list[Chart]:
    return [performance.accuracy(Grid(run))]


STUDY = Study(
    name="mixed",
    question="Do both kinds run?",
    source="–",
    settings=Settings,
    scales={"quick": Settings(), "full": Settings()},
    cells=cells,
    run=compute,
    figures=figures,
    claims=[
        Claim(
            id="sum",
            sentence="The sum is 10",
            source="–",
            reported="10",
            effect="the sum",
            measure=lambda run: {s: c.series("sum")[3] for s, c in run.by_seed(n=4).items()},
            rule=Above(9.5),
        )
    ],
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    settings = Settings(seeds=2, steps=4, every=2, width=8, probes=("performance",))
    return plan_study(STUDY, settings, tmp_path / "run")


def test_both_kinds_run_are_judged_and_shown(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    commands._dry_run([plan], 1)
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 7
    assert re.search(r"missing +seed 0, n 4, task digits$", listed[0])
    assert re.search(r"missing +seed 0, norm none, lr 0.1, model mlp$", listed[2])
    assert "6 cells of 6 to compute" in listed[-1]

    (run,), interrupted = run_studies([plan], plan.out)
    assert not interrupted
    assert [verdict.verdict for verdict in STUDY.verdicts(run)] == ["holds"]

    grid = Grid(run)
    assert grid.planned == len(grid.cells) == 4
    assert [arm.name for arm in grid.arms] == ["none", "batch"]
    assert len(run.cells) == 6

    part = commands.replication(run, STUDY)
    assert part.norms == ["none", "batch"]
    commands.write_replications([part], plan.out / "report.html", command="")
    assert "no normalization" in (plan.out / "report.html").read_text()

    commands._status([plan], json=False)
    assert "6 of 6 cells done" in capsys.readouterr().out
    commands._dry_run([plan], 1)
    assert "0 cells of 6 to compute, about 0 s" in capsys.readouterr().out


def test_edited_code_makes_new_cells_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "owntask.py"
    settings = Settings(seeds=1, task="owntask:make")

    def hashes() -> list[str]:
        return [job.folder.name for job in plan_study(STUDY, settings, tmp_path / "run").jobs]

    source.write_text("def make(): ...\n")
    before = hashes()
    source.write_text("def make(): return None\n")
    assert len(before) == 3
    assert not set(before) & set(hashes())
