"""What all charts are built of."""

from __future__ import annotations

from tests.report.runs import Builder, charts_of, measured


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


def test_a_single_seed_has_no_band_over_seeds(builder: Builder) -> None:
    builder.cell("batch", 0.1, 0, measured("batch"))
    charts = charts_of(builder)
    assert charts["loss"].panels[0].lines[0].low is None
    assert charts["percentiles"].panels[0].lines[0].low is not None
