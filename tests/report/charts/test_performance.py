"""Loss, accuracy and where they ended, against the records behind them."""

from __future__ import annotations

import math

from tests.report.runs import Builder, charts_of, series

from batchnorm.report.spec import plain


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
