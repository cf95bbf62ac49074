"""Running statistics against those of the batch."""

from __future__ import annotations

from tests.report.runs import Builder, charts_of, measured


def test_only_arms_with_running_statistics_are_in_their_charts(builder: Builder) -> None:
    for norm in ("none", "batch"):
        builder.cell(norm, 0.1, 0, measured(norm))
    lines = [line for panel in charts_of(builder)["running-mean"].panels for line in panel.lines]
    assert {line.arm for line in lines} == {1}
