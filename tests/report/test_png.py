"""The charts as pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.report.runs import Builder, measured

from batchnorm.extras import MissingExtraError
from batchnorm.report import write_png


def test_one_picture_a_chart(builder: Builder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    for seed in range(2):
        builder.cell("none", 0.1, seed, measured("none"))
        builder.cell("batch", 0.1, seed, measured("batch"))
        builder.cell("none", 1.0, seed, measured("none", stop=20), state="diverged", step=20)
        builder.cell("batch", 1.0, seed, measured("batch"))
    files = write_png(builder.run(), tmp_path / "png")
    assert len(files) == 16
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_nothing_to_draw(builder: Builder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    builder.cell("none", 0.1, 0, None)
    assert write_png(builder.run(), tmp_path / "png") == []


def test_without_matplotlib_the_extra_is_named(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    builder.cell("none", 0.1, 0, measured("none"))
    with pytest.raises(MissingExtraError, match=r"pip install 'batchnorm\[plot\]'"):
        write_png(builder.run(), tmp_path / "png")
    assert not (tmp_path / "png").exists()
