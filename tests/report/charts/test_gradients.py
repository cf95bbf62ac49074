"""Gradient norms by depth."""

from __future__ import annotations

import numpy as np
from tests.report.runs import Builder, charts_of, measured


def test_gradients_stand_at_the_place_of_their_layer(builder: Builder) -> None:
    builder.cell("none", 0.1, 0, measured("none"))
    panel = charts_of(builder)["gradients"].panels[0]
    assert panel.title == "step 0"
    np.testing.assert_allclose(panel.lines[0].x, [1, 2, 3])
    assert panel.lines[0].y is not None
    np.testing.assert_allclose(panel.lines[0].y, [2e-3, 2e-2, 2e-1])
