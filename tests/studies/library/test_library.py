"""What holds for every study."""

import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.records import Run
from batchnorm.studies.library import load, names
from batchnorm.studies.run_study import plan_study, settings_of
from batchnorm.studies.settings import SettingsError

DOCS = Path(__file__).parents[3] / "docs" / "studies"


@pytest.mark.parametrize("name", names())
def test_every_study_is_whole(name: str, tmp_path: Path) -> None:
    study = load(name)
    assert study.name == name
    assert set(study.scales) == {"quick", "full"}
    assert (DOCS / f"{name}.md").is_file()
    assert (Path(__file__).parent / f"test_{name.replace('-', '_')}.py").is_file()
    ids = [claim.id for claim in study.claims]
    assert len(set(ids)) == len(ids)
    empty = Run(tmp_path, {"study": name, "scale": "quick", "cells": []}, ())
    for verdict in study.verdicts(empty):
        assert verdict.verdict == "cannot tell at this scale"
    plan = plan_study(study, settings_of(study, "quick", {}), tmp_path / "run")
    hashes = [job.folder.name for job in plan.jobs]
    assert len(set(hashes)) == len(hashes)
    seeds = {job.settings.seed for job in plan.jobs}
    assert len(seeds) >= 2, "verdicts are intervals over seeds"


def test_listing_the_studies_needs_no_torch() -> None:
    code = (
        "import sys; from batchnorm.studies.library import load, names; "
        "[load(name) for name in names()]; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_unknown_names_come_with_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"'theorem' is unknown\. Did you mean 'theorems'"):
        load("theorem")
    with pytest.raises(SettingsError, match="scale='fast' is unknown"):
        settings_of(load("bias"), "fast", {})
    with pytest.raises(SettingsError, match=r"stepz is not a setting\. Did you mean 'steps'"):
        settings_of(load("bias"), "quick", {"stepz": 3})
