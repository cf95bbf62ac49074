"""The charts as pictures."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.report.runs import Builder, measured

from batchnorm.extras import MissingExtraError
from batchnorm.records import Run
from batchnorm.report import write_png
from batchnorm.report.png import write_charts
from batchnorm.report.replication import Replication
from batchnorm.report.spec import Axis, Chart, Line, Panel


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


def test_a_legend_of_many_rows_leaves_the_panel_its_height(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    names = tuple(f"a network with a name that takes a row by itself, {i}" for i in range(14))
    lines = [Line(i, np.array([0.0, 1.0]), np.array([0.0, i])) for i in range(len(names))]
    chart = Chart("many", "Many", "", "", Axis("x"), Axis("y"), [Panel("", lines)])
    part = Replication("many", "?", "", Run(tmp_path, {"cells": []}, ()), (), [chart], names)
    # Where nothing is left of the panel matplotlib warns, which is an error here.
    (path,) = write_charts(part, tmp_path)
    width, height = struct.unpack(">2I", path.read_bytes()[16:24])
    assert height > width


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
