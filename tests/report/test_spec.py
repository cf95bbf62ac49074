"""The form of a chart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from batchnorm.report.spec import Line, fit


def test_thinning_keeps_the_ends_and_the_means() -> None:
    line = Line(0, np.arange(1000.0), np.arange(1000.0), ends=[])
    thin = line.thinned(100)
    assert len(thin.x) == 100
    assert (thin.x[0], thin.x[-1]) == (0, 999)
    assert thin.y is not None
    assert thin.y.mean() == pytest.approx(499.5)
    assert line.thinned(1000) is line


def test_the_axis_covers_the_usual_and_cuts_off_the_runaway() -> None:
    usual = Line(0, np.arange(50.0), np.linspace(1, 2, 50))
    runaway = Line(1, np.arange(3.0), np.array([2.0, 1e10, math.nan]))
    covered = fit([usual, runaway])
    assert covered is not None
    assert covered[0] < 1
    assert 2 < covered[1] < 100
    assert fit([Line(0, np.zeros(2), np.array([math.nan, math.nan]))]) is None
    level = fit([Line(0, np.arange(2.0), np.array([0.0, 0.0]))])
    assert level is not None
    assert level[0] < 0 < level[1]
