from pathlib import Path

import pytest
from tests.report.runs import Builder


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    return Builder(tmp_path / "run")
