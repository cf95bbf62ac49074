"""What is drawn, against the records behind it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.report.runs import Builder, measured, series

from batchnorm.records import Record
from batchnorm.report.charts import build
from batchnorm.report.grid import Grid, across
from batchnorm.report.headline import summarize
from batchnorm.report.spec import Chart, Line, fit, plain


def charts_of(builder: Builder) -> dict[str, Chart]:
    run = builder.run()
    return {chart.id: chart for chart in build(Grid(run), summarize(run))}


def test_mean_and_range_over_seeds_leave_out_what_is_not_finite() -> None:
    found = across([{0: 1.0, 5: math.inf, 9: math.nan}, {0: 3.0, 5: 2.0, 9: math.inf}])
    assert found is not None
    np.testing.assert_array_equal(found.x, [0, 5, 9])
    np.testing.assert_array_equal(found.y, [2, 2, math.nan])
    np.testing.assert_array_equal(found.low, [1, 2, math.nan])
    np.testing.assert_array_equal(found.high, [3, 2, math.nan])
    assert across([{}, {}]) is None


def test_a_diverged_arm_ends_with_a_mark_and_never_at_zero(builder: Builder) -> None:
    losses = {0: 2.0, 1: 8.0, 2: math.nan}
    builder.cell("none", 0.1, 0, series("batch/loss", losses), state="diverged", step=2)
    builder.cell("batch", 0.1, 0, series("batch/loss", {0: 2.0, 1: 1.5, 2: 1.0}))
    chart = charts_of(builder)["loss"]
    line = chart.panels[0].lines[0]
    assert plain(line)["y"] == [2, 8, None]
    assert [(end.x, end.y) for end in line.ends] == [(2, 8)]
    assert "diverged without normalization at step 2 (1 of 1 seed)" in chart.finding(0)


def test_learning_rates_at_which_all_seeds_diverged_have_no_value(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, series("test/accuracy", {0: 0.1, 100: 0.9}))
    lost = series("test/accuracy", {0: 0.1})
    builder.cell("none", 1.0, 0, lost, state="diverged", step=7)
    (line,) = charts_of(builder)["learning-rate"].panels[0].lines
    assert plain(line)["y"] == [0.9, None]
    assert plain(line.ends) == [{"x": 1, "y": None}]


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


def test_many_layers_open_with_three_and_offer_all(builder: Builder) -> None:
    layers = [f"conv{i}" for i in range(1, 14)] + ["out"]
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, measured(norm, layers=layers), layers=layers)
    charts = charts_of(builder)
    assert charts["percentiles"].overview == ["conv13", "conv7", "conv1"]
    assert [panel.layer for panel in charts["percentiles"].shown(0)][::2] == [
        "conv13",
        "conv7",
        "conv1",
    ]
    assert charts["shift-cosine"].overview == ["out", "conv8", "conv2"]
    assert {panel.layer for panel in charts["weight-norm"].panels} == set(layers)


def test_gradients_stand_at_the_place_of_their_layer(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, measured("none"))
    panel = charts_of(builder)["gradients"].panels[0]
    assert panel.title == "step 0"
    np.testing.assert_allclose(panel.lines[0].x, [1, 2, 3])
    assert panel.lines[0].y is not None
    np.testing.assert_allclose(panel.lines[0].y, [2e-3, 2e-2, 2e-1])


def test_a_single_seed_has_no_band_over_seeds(builder: Builder) -> None:
    builder.cell("batch", 0.1, 0, measured("batch"))
    charts = charts_of(builder)
    assert charts["loss"].panels[0].lines[0].low is None
    assert charts["percentiles"].panels[0].lines[0].low is not None


def test_only_arms_with_running_statistics_are_in_their_charts(builder: Builder) -> None:
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, measured(norm))
    lines = [line for panel in charts_of(builder)["running-mean"].panels for line in panel.lines]
    assert {line.arm for line in lines} == {1}


@pytest.mark.parametrize(
    ("cosines", "said"),
    [((0.9, 0.4), "larger with batch norm than without normalization"), ((0.5, 0.5), "about the")],
)
def test_the_shift_is_compared_as_it_was_measured(
    builder: Builder, cosines: tuple[float, float], said: str
) -> None:
    for norm, cosine in zip(("none", "batch"), cosines, strict=True):
        records = [Record(s, "fc2", "shift/cosine", cosine) for s in (0, 10)]
        records += [Record(s, "fc1", "shift/cosine", 1.0) for s in (0, 10)]
        builder.cell(norm, 0.1, 0, records)
    assert said in charts_of(builder)["shift-cosine"].finding(0)
