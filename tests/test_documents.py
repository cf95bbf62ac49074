"""What the documents promise is there, and their code runs."""

import re
from pathlib import Path

import pytest

from batchnorm.records import Run
from batchnorm.studies.compare import compare
from batchnorm.studies.instruments import PROBES
from batchnorm.studies.models import MODELS
from batchnorm.studies.settings import CompareSettings
from batchnorm.studies.tasks import TASKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_of_the_readme_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_code_of_the_guide_to_transforms_runs() -> None:
    """Its parts build on each other."""
    text = (ROOT / "docs" / "transforms.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    exec(compile(code, "docs/transforms.md", "exec"), {})


def test_the_guide_to_transforms_names_every_verb() -> None:
    from batchnorm import _HOMES

    text = (ROOT / "docs" / "transforms.md").read_text()
    assert [name for name in _HOMES if f"`{name}`" not in text] == []


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_architecture_names_every_folder_and_no_other() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    tree = text[text.index("src/batchnorm/\n") : text.index("web/  ")]
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    there = {path.parent.name for path in ROOT.glob("src/batchnorm/*/__init__.py")}
    assert named == there


def test_the_guide_names_every_task_and_network() -> None:
    guide = (ROOT / "docs" / "compare.md").read_text()
    assert [name for name in (*TASKS, *MODELS) if f"`{name}`" not in guide] == []


def test_every_quantity_that_is_recorded_is_documented(tmp_path: Path) -> None:
    run, _ = compare(CompareSettings(steps=4, seeds=1, lr=(0.1,)), tmp_path / "run")
    assert isinstance(run, Run)
    document = (ROOT / "docs" / "records.md").read_text()
    documented = set(re.findall(r"`(\w+/\w+)`", document)) | {"activation/p50", "activation/p85"}
    recorded = {record.quantity for cell in run.cells for record in cell.records}
    assert recorded == documented
    assert {name.split("/")[0] for name in recorded} >= {"batch", "train", "test", "shift"}
    manifest_keys = set(run.cells[0].manifest) - {"format", "cell"}
    assert [key for key in manifest_keys if f"`{key}`" not in document] == []
    assert len(PROBES) == 8
