"""A run as a grid."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.report.grid import across


def test_mean_and_range_over_seeds_leave_out_what_is_not_finite() -> None:
    found = across([{0: 1.0, 5: math.inf, 9: math.nan}, {0: 3.0, 5: 2.0, 9: math.inf}])
    assert found is not None
    np.testing.assert_array_equal(found.x, [0, 5, 9])
    np.testing.assert_array_equal(found.y, [2, 2, math.nan])
    np.testing.assert_array_equal(found.low, [1, 2, math.nan])
    np.testing.assert_array_equal(found.high, [3, 2, math.nan])
    assert across([{}, {}]) is None
