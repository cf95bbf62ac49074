"""Gradient descent on least squares, in float64: its curvature, its path, and its steps.

With a column of ones for the bias, X ∈ R^(n×d), the loss ‖Xw − y‖²/(2n) has the Hessian
H = XᵀX/n, whatever y is, and a step at rate η takes the error e = w − w* to (I − ηH)e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputScaling", "Quadratic", "scaled", "theory"]

Array = NDArray[np.float64]
InputScaling = Literal["raw", "range", "standardize"]


def scaled(features: Array, scaling: InputScaling) -> Array:
    """The features (n, d) that vary, scaled one by one.

    ``raw`` leaves them, ``range`` divides each by its largest absolute value, and ``standardize``
    gives each mean 0 and variance 1.

    Example:
        >>> scaled(np.array([[1.0, 7.0], [3.0, 7.0]]), "standardize").tolist()
        [[-1.0], [1.0]]
    """
    features = features[:, np.ptp(features, axis=0) > 0]
    if scaling == "range":
        scale: Array = features / np.abs(features).max(axis=0)
        return scale
    if scaling == "standardize":
        return np.asarray((features - features.mean(axis=0)) / features.std(axis=0))
    return features


def theory(condition: float, tolerance: float) -> float:
    """Steps until the error is ``tolerance`` of its start, at the best rate and from the worst one.

    Every step takes the error to at most ρ = (κ − 1)/(κ + 1) of itself: ln(tolerance)/ln ρ.

    Example:
        >>> round(theory(3.0, 1e-6), 6)  # ρ = 1/2
        19.931569
    """
    shrinks = (condition - 1) / (condition + 1)
    return math.log(tolerance) / math.log(shrinks) if shrinks else 1.0


@dataclass(frozen=True)
class Quadratic:
    """The loss of a linear regression around its minimum.

    ``hessian`` is H (d, d), ``curvatures`` its eigenvalues in rising order and ``directions`` their
    eigenvectors in columns. Directions in which the data do not differ from zero, to rounding, are
    left out: descent never moves along them.
    """

    hessian: Array
    curvatures: Array
    directions: Array

    @classmethod
    def of(cls, features: Array) -> Quadratic:
        """The regression on ``features`` (n, d) and a bias."""
        x = np.column_stack([np.ones(len(features)), features])
        hessian = x.T @ x / len(x)
        curvatures, directions = np.linalg.eigh(hessian)
        felt = curvatures > curvatures[-1] * len(hessian) * np.finfo(np.float64).eps
        return cls(hessian, curvatures[felt], directions[:, felt])

    @property
    def condition(self) -> float:
        """κ = λ_max/λ_min."""
        return float(self.curvatures[-1] / self.curvatures[0])

    @property
    def update(self) -> Array:
        """I − ηH at the rate that shrinks the worst error most, η = 2/(λ_max + λ_min)."""
        rate = 2 / (self.curvatures[0] + self.curvatures[-1])
        return np.asarray(np.eye(len(self.hessian)) - rate * self.hessian)

    @property
    def worst(self) -> Array:
        """The error that shrinks least: as much of the flattest as of the steepest direction."""
        return np.asarray(self.directions[:, 0] + self.directions[:, -1])

    def random(self, seed: int) -> Array:
        """A Gaussian error, the same in every direction."""
        parts = np.random.default_rng(seed).standard_normal(len(self.curvatures))
        return np.asarray(self.directions @ parts)

    def errors(self, start: Array, tolerance: float) -> tuple[dict[int, float], int]:
        """The error's size after 1, 2, 4, … steps, and the steps until it is ``tolerance``.

        Sizes are shares of that of ``start`` (d,). Steps are taken 2ᵏ at a time, by squares of the
        update, and the last of them are found by bisection: a hundred million take no time.
        """
        goal = tolerance * np.linalg.norm(start)
        powers, sizes = [self.update], {}
        while True:
            size = np.linalg.norm(powers[-1] @ start)
            sizes[2 ** (len(powers) - 1)] = float(size / np.linalg.norm(start))
            if size <= goal:
                break
            powers.append(powers[-1] @ powers[-1])
        error, steps = start, 0
        for exponent, power in reversed([*enumerate(powers)]):
            further = power @ error
            if np.linalg.norm(further) > goal:
                error, steps = further, steps + 2**exponent
        return sizes, steps + 1

    def path(self, steps: int) -> Array:
        """The worst error's parts along the flattest and the steepest direction (steps + 1, 2)."""
        ends = self.directions[:, [0, -1]]
        error, update, parts = self.worst, self.update, []
        for _ in range(steps + 1):
            parts.append(error @ ends)
            error = update @ error
        return np.array(parts)
