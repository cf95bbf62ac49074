"""The form of the headline: how each arm ended, who reached what first, and all of it in one."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.report.words import number, percent

__all__ = ["Outcome", "Race", "Spread", "Summary"]


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds that have it."""

    mean: float
    median: float
    low: float
    high: float
    seeds: dict[int, float]

    @classmethod
    def of(cls, seeds: dict[int, float]) -> Spread | None:
        """The spread of finite values; ``None`` where there are none."""
        if not seeds:
            return None
        values = list(seeds.values())
        return cls(
            statistics.fmean(values), statistics.median(values), min(values), max(values), seeds
        )


@dataclass(frozen=True)
class Outcome:
    """How one arm ended at one learning rate.

    ``best`` is the best value of the measure seen during training, ``final`` the last one.
    ``stable``: every seed ended with a training loss below that of the best answer that ignores
    the input; ``None`` while a seed has not ended or where that loss was not measured.
    ``guessing``: the mean final accuracy is within three standard errors of what guessing gives,
    or below; a network can be stable and yet not learn.
    """

    arm: str
    lr: float
    final: Spread | None
    best: Spread | None
    steps_to_best: Spread | None
    diverged: dict[int, int]
    ended: int
    planned: int
    stable: bool | None
    guessing: bool


@dataclass(frozen=True)
class Race:
    """Steps until ``arm`` reached the best that ``other`` reached, both at one learning rate.

    Seeds are paired. ``steps`` holds the seeds that reached it; ``missed`` those that did not.
    ``median`` counts a missed seed as infinitely late, and is ``None`` where that makes it so.
    ``other_steps`` is when ``other`` itself first reached its best.
    """

    arm: str
    other: str
    lr: float
    target: Spread
    steps: dict[int, int]
    missed: list[int]
    median: float | None
    other_steps: Spread

    @property
    def reached(self) -> Spread | None:
        """The steps of the seeds that reached it; ``None`` where none did."""
        return Spread.of({seed: float(step) for seed, step in self.steps.items()})


@dataclass(frozen=True)
class Summary:
    """The headline of a study, as numbers and as sentences.

    ``measured_every`` is the stride in which steps are counted: between two measurements nothing
    is known. ``reference`` is the arm that others are compared with, and ``reference_rate`` the
    learning rate that suited it best; ``largest_stable`` and ``best_rate`` are by arm.
    """

    study: str
    measure: str
    measured_every: int | None
    higher_is_better: bool
    arms: list[str]
    reference: str | None
    rates: list[float]
    reference_rate: float | None
    cells: dict[str, int]
    outcomes: list[Outcome]
    races: list[Race]
    largest_stable: dict[str, float | None]
    best_rate: dict[str, float | None]
    probe_share: float | None
    sentences: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The summary as plain values that JSON can hold."""
        return asdict(self)

    @property
    def any_ended(self) -> bool:
        """Whether there is any final figure at all."""
        return any(one.ended for one in self.outcomes)

    def outcome(self, arm: str, lr: float) -> Outcome:
        """How ``arm`` ended at ``lr``."""
        return next(one for one in self.outcomes if (one.arm, one.lr) == (arm, lr))

    def best_outcome(self, arm: str) -> Outcome | None:
        """How ``arm`` ended at the learning rate that suited it best, where one did."""
        rate = self.best_rate[arm]
        return self.outcome(arm, rate) if rate is not None else None

    def race(self, arm: str, other: str, lr: float) -> Race | None:
        """The race of ``arm`` against the best of ``other``, where there was one."""
        places = (one for one in self.races if (one.arm, one.other, one.lr) == (arm, other, lr))
        return next(places, None)

    def shown_stable(self, arm: str) -> str:
        """The largest stable learning rate of an arm in words."""
        largest = self.largest_stable[arm]
        if largest is not None:
            return number(largest)
        judged = [one.stable for one in self.outcomes if one.arm == arm]
        return "not known yet" if None in judged else "none"

    def show(self, value: float) -> str:
        """A value of the measure in words."""
        return percent(value) if self.higher_is_better else number(value, 4)
