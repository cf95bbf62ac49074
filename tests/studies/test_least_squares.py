"""Least squares against gradient descent in a plain loop and against curvatures known by hand."""

import math

import numpy as np
import pytest
from tests.tolerances import DOUBLE

from batchnorm.studies.least_squares import Quadratic, scaled, theory


def test_the_curvatures_of_an_orthogonal_design() -> None:
    # Columns 1, ±1·a, ±1·b of a full factorial are orthogonal: H = diag(1, a², b²).
    a, b = 3.0, 0.25
    features = np.array([[s * a, t * b] for s in (-1, 1) for t in (-1, 1)])
    loss = Quadratic.of(features)
    assert loss.curvatures == pytest.approx([b**2, 1.0, a**2], rel=DOUBLE)
    assert loss.condition == pytest.approx(a**2 / b**2, rel=DOUBLE)
    # Standardised it is the identity: one step reaches the minimum.
    assert Quadratic.of(scaled(features, "standardize")).condition == pytest.approx(1, rel=DOUBLE)


@pytest.mark.parametrize("start", ["worst", "random"])
def test_steps_are_those_of_a_plain_loop(start: str) -> None:
    random = np.random.default_rng(3)
    features = random.uniform(0, [1, 4, 2], (50, 3))
    loss = Quadratic.of(features)
    error = loss.worst if start == "worst" else loss.random(7)
    sizes, steps = loss.errors(error, 1e-4)

    # Descent on ‖Xw − y‖²/(2n) itself, with a y that is not zero.
    x = np.column_stack([np.ones(50), features])
    minimum = np.array([1.0, -2.0, 0.5, 3.0])
    y = x @ minimum
    curvatures = np.linalg.eigvals(x.T @ x / 50)
    rate = 2 / (curvatures.max() + curvatures.min())
    w, left = minimum + error, [1.0]
    while left[-1] > 1e-4:
        w = w - rate * x.T @ (x @ w - y) / 50
        left.append(float(np.linalg.norm(w - minimum) / np.linalg.norm(error)))
    assert steps == len(left) - 1
    assert steps > 100
    assert {1, 2, 4, 64} <= set(sizes)
    for step, size in sizes.items():
        if step < len(left):
            assert size == pytest.approx(left[step], rel=1e3 * DOUBLE)


def test_the_worst_start_takes_what_theory_says() -> None:
    for largest in (2.0, 30.0):
        loss = Quadratic.of(np.array([[largest], [-largest]]))
        _, steps = loss.errors(loss.worst, 1e-6)
        assert steps == math.ceil(theory(largest**2, 1e-6))
        _, fewer = loss.errors(loss.directions[:, 0] * 0.9 + loss.directions[:, 1], 1e-6)
        assert fewer <= steps


def test_the_path_changes_sides_at_every_step() -> None:
    loss = Quadratic.of(np.array([[2.0], [-2.0]]))  # κ = 4, ρ = 3/5
    flattest, steepest = loss.path(3).T
    assert flattest == pytest.approx([1, 0.6, 0.36, 0.216], rel=DOUBLE)
    assert steepest == pytest.approx([1, -0.6, 0.36, -0.216], rel=DOUBLE)


def test_constant_and_repeated_features() -> None:
    feature = np.array([1.0, 2.0, 4.0])
    assert scaled(np.column_stack([feature, [5.0, 5.0, 5.0]]), "raw").shape == (3, 1)
    once, twice = Quadratic.of(feature[:, None]), Quadratic.of(np.column_stack([feature, feature]))
    assert len(twice.curvatures) == len(once.curvatures) == 2  # what they differ in is never felt
    assert twice.errors(twice.random(0), 1e-6)[1] < 10_000
    assert np.abs(scaled(feature[:, None] * -3, "range")).max() == 1
