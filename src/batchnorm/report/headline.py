"""The figures a reader wants first, computed from a run and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from batchnorm.records import Cell, Run
from batchnorm.report.grid import Arm, Grid, ended
from batchnorm.report.words import count, join, number, percent, plural, seeds_of, span, times

__all__ = ["Outcome", "Race", "Spread", "Summary", "summarize"]


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
    the input; ``None`` while a seed has not ended or where that loss was not measured. ``guessing``: the mean final accuracy is within three
    standard errors of what guessing gives, or below; a network can be stable and yet not learn.
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


@dataclass(frozen=True)
class Summary:
    """The headline of a study, as numbers and as sentences.

    ``measured_every`` is the stride in which steps are counted: between two measurements nothing
    is known. ``reference`` is the arm that others are compared with, and ``reference_rate`` the
    learning rate that suited it best.
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

    def outcome(self, arm: str, lr: float) -> Outcome:
        """How ``arm`` ended at ``lr``."""
        return next(one for one in self.outcomes if (one.arm, one.lr) == (arm, lr))

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


def summarize(run: Run) -> Summary:
    """Compute the headline of a run.

    The measure is the test accuracy, or the test loss for tasks that have no accuracy. Cells that
    have not ended count for nothing but the progress.
    """
    grid = Grid(run)
    accuracy = grid.has("test/accuracy")
    quantity, sign = ("test/accuracy", 1) if accuracy else ("test/loss", -1)
    outcomes = [_outcome(grid, arm, lr, quantity, sign) for lr in grid.rates for arm in grid.arms]
    names = [arm.name for arm in grid.arms]
    reference = next((name for name in ("none", *names) if name in names), None)
    stable, best = {}, {}
    for name in names:
        own = [one for one in outcomes if one.arm == name]
        stable[name] = max((one.lr for one in own if one.stable), default=None)
        ended_well = [(sign * one.final.mean, one) for one in own if one.final and not one.diverged]
        best[name] = max(ended_well, key=lambda pair: pair[0])[1].lr if ended_well else None
    at = best[reference] if reference else None
    started = [rate for rate in grid.rates if any(grid.at(arm, rate) for arm in grid.arms)]
    summary = Summary(
        study=str(run.study["study"]),
        measure="test accuracy" if accuracy else "test loss",
        measured_every=_stride(grid, quantity),
        higher_is_better=accuracy,
        arms=names,
        reference=reference,
        rates=grid.rates,
        reference_rate=at if at is not None else next(iter(started), None),
        cells=_progress(grid),
        outcomes=outcomes,
        races=[
            race
            for lr in grid.rates
            for arm in grid.arms
            for other in grid.arms
            if arm != other and (race := _race(grid, arm, other, lr, quantity, sign))
        ],
        largest_stable=stable,
        best_rate=best,
        probe_share=probe_share(run.cells),
    )
    summary.sentences.extend(_sentences(summary, grid))
    return summary


def probe_seconds(cell: Cell) -> dict[str, float]:
    """Seconds that each probe took: what the timing holds beside the training and the total."""
    timing = cell.manifest["timing"]
    return {name: float(s) for name, s in timing.items() if name not in ("train", "total")}


def probe_share(cells: Sequence[Cell]) -> float | None:
    """Share of all time that the probes took; ``None`` before anything was timed."""
    total = sum(float(cell.manifest["timing"].get("total", 0)) for cell in cells)
    return sum(sum(probe_seconds(cell).values()) for cell in cells) / total if total else None


def _stride(grid: Grid, quantity: str) -> int | None:
    steps = [sorted(cell.series(quantity)) for cell in grid.cells]
    return min((b - a for one in steps for a, b in pairwise(one)), default=None)


def _progress(grid: Grid) -> dict[str, int]:
    states = [cell.manifest["state"] for cell in grid.cells]
    done, diverged = states.count("done"), states.count("diverged")
    return {
        "planned": grid.planned,
        "done": done,
        "diverged": diverged,
        "unfinished": len(states) - done - diverged,
        "not_started": grid.planned - len(states),
    }


def _finite(values: dict[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _stable(cell: Cell) -> bool | None:
    if not ended(cell):
        return None
    if cell.manifest["state"] == "diverged":
        return False
    losses = cell.series("train/loss")
    if not losses:
        return None
    return losses[max(losses)] < float(cell.manifest["task"]["constant_loss"])


def _best(values: dict[int, float], sign: int) -> tuple[int, float]:
    """The step that first had the best value, and that value."""
    top = max(sign * value for value in values.values())
    return next((s, v) for s, v in sorted(values.items()) if sign * v == top)


def _outcome(grid: Grid, arm: Arm, lr: float, quantity: str, sign: int) -> Outcome:
    final, best, when, diverged, stable = {}, {}, {}, {}, []
    cells = [cell for cell in grid.at(arm, lr) if ended(cell)]
    for cell in cells:
        seed = int(cell.settings["seed"])
        stable.append(_stable(cell))
        if cell.manifest["state"] == "diverged":
            diverged[seed] = int(cell.manifest["step"])
            continue
        values = _finite(cell.series(quantity))
        if values:
            final[seed] = values[max(values)]
            when[seed], best[seed] = _best(values, sign)
    known = None not in stable and len(stable) == len(grid.seeds)
    verdict = False not in stable if False in stable or known else None
    return Outcome(
        arm=arm.name,
        lr=lr,
        final=Spread.of(final),
        best=Spread.of(best),
        steps_to_best=Spread.of({seed: float(step) for seed, step in when.items()}),
        diverged=diverged,
        ended=len(cells),
        planned=len(grid.seeds),
        stable=verdict,
        guessing=_guessing(grid, Spread.of(final)),
    )


def _guessing(grid: Grid, final: Spread | None) -> bool:
    share = grid.guessing
    if share is None or final is None or not grid.tested:
        return False
    return final.mean <= share + 3 * math.sqrt(share * (1 - share) / grid.tested)


def _race(grid: Grid, arm: Arm, other: Arm, lr: float, quantity: str, sign: int) -> Race | None:
    runners = {int(cell.settings["seed"]): cell for cell in grid.at(arm, lr) if ended(cell)}
    targets, own, steps, missed = {}, {}, {}, []
    for cell in grid.at(other, lr):
        seed, values = int(cell.settings["seed"]), _finite(cell.series(quantity))
        # A network that diverged set no mark worth reaching, and pairs need both seeds.
        if cell.manifest["state"] != "done" or seed not in runners or not values:
            continue
        step, target = _best(values, sign)
        targets[seed], own[seed] = target, float(step)
        reached = [
            at
            for at, value in _finite(runners[seed].series(quantity)).items()
            if sign * value >= sign * target
        ]
        if reached:
            steps[seed] = min(reached)
        else:
            missed.append(seed)
    target_spread, own_spread = Spread.of(targets), Spread.of(own)
    if target_spread is None or own_spread is None:
        return None
    median = statistics.median([*steps.values(), *[math.inf] * len(missed)])
    return Race(
        arm=arm.name,
        other=other.name,
        lr=lr,
        target=target_spread,
        steps=steps,
        missed=missed,
        median=median if math.isfinite(median) else None,
        other_steps=own_spread,
    )


def _over(spread: Spread, shown: str, low: str, high: str) -> str:
    """``shown`` with its range over the seeds, where there is one."""
    if len(spread.seeds) == 1:
        return shown
    same = f"the same {seeds_of(len(spread.seeds), len(spread.seeds))}"
    return f"{shown} ({same if low == high else span(low, high)})"


def _final(summary: Summary, spread: Spread) -> str:
    show = summary.show
    return _over(spread, show(spread.mean), show(spread.low), show(spread.high))


def _sentences(summary: Summary, grid: Grid) -> list[str]:
    arms = {arm.name: arm for arm in grid.arms}
    said = [_said_progress(summary)]
    rate = summary.reference_rate
    if rate is not None:
        others = [name for name in summary.arms if name != summary.reference]
        races = [summary.race(name, summary.reference or "", rate) for name in others]
        said += [_said_race(summary, race, arms) for race in races if race]
        said.append(_said_final(summary, rate, arms))
        said.append(_said_diverged(summary, arms))
        said.append(_said_stable(summary, arms))
        said.append(_said_guessing(summary, grid, arms))
        said.append(_said_best(summary, arms))
    if summary.probe_share is not None:
        share = percent(summary.probe_share)
        said.append(f"The measurements themselves took {share} of the computing time.")
    return [sentence for sentence in said if sentence]


def _said_progress(summary: Summary) -> str:
    cells = summary.cells
    over = cells["done"] + cells["diverged"]
    if over == cells["planned"]:
        return ""
    return (
        f"This study is not finished: {over} of {plural(cells['planned'], 'training run')} ended, "
        f"{cells['unfinished']} stopped or going on, {cells['not_started']} not started. "
        "Figures are over those that ended."
    )


def _said_race(summary: Summary, race: Race, arms: dict[str, Arm]) -> str:
    arm, other = arms[race.arm], arms[race.other]
    seeds = len(race.target.seeds)
    average = "" if seeds == 1 else " on average"
    mark = (
        f"the best {summary.measure} of {other.network} ({summary.show(race.target.mean)}{average})"
    )
    start = f"At learning rate {number(race.lr)}, {arm.network}"
    if not race.steps:
        return f"{start} did not reach {mark} {seeds_of(seeds, seeds)}."
    spread = Spread.of({seed: float(step) for seed, step in race.steps.items()})
    assert spread is not None
    took = _over(spread, f"{count(spread.median)} steps", count(spread.low), count(spread.high))
    own = race.other_steps
    needed = _over(own, count(own.median), count(own.low), count(own.high))
    if race.missed:
        return (
            f"{start} reached {mark} {seeds_of(len(race.steps), seeds)}, after {took} there, "
            f"and not in the others. {other.network.capitalize()} needed {needed}."
        )
    ratio = f": {times(own.median / spread.median)}" if spread.median else ""
    return (
        f"{start} reached {mark} after {took}. {other.network.capitalize()} needed {needed}{ratio}."
    )


def _said_final(summary: Summary, rate: float, arms: dict[str, Arm]) -> str:
    finals = {name: summary.outcome(name, rate).final for name in summary.arms}
    there = {name: spread for name, spread in finals.items() if spread}
    if not there:
        return ""
    listed = join([f"{_final(summary, s)} {arms[name].phrase}" for name, s in there.items()])
    sentence = f"Final {summary.measure} at learning rate {number(rate)}: {listed}."
    return sentence + _apart(there)


def _apart(finals: dict[str, Spread]) -> str:
    """Whether two arms can be told apart by what the seeds show."""
    if len(finals) != 2:
        return ""
    one, two = finals.values()
    if min(len(one.seeds), len(two.seeds)) < 2:
        return " With a single seed, the difference may be chance."
    apart = one.low > two.high or two.low > one.high
    return f" The ranges over the seeds {'do not overlap' if apart else 'overlap'}."


def _said_diverged(summary: Summary, arms: dict[str, Arm]) -> str:
    parts = []
    for one in summary.outcomes:
        if one.diverged:
            steps = sorted(one.diverged.values())
            when = f"{'step' if steps[0] == steps[-1] else 'steps'} " + span(
                count(steps[0]), count(steps[-1])
            )
            share = seeds_of(len(one.diverged), one.planned)
            parts.append(
                f"{arms[one.arm].phrase} at learning rate {number(one.lr)} {share} ({when})"
            )
    if parts:
        return f"Training diverged (the loss was no longer a number) {join(parts)}."
    return "No training run diverged." if summary.cells["done"] else ""


def _said_stable(summary: Summary, arms: dict[str, Arm]) -> str:
    if len(summary.rates) < 2 or not any(one.ended for one in summary.outcomes):
        return ""
    parts = []
    for name in summary.arms:
        top = " (the largest tried)" if summary.largest_stable[name] == summary.rates[-1] else ""
        parts.append(f"{summary.shown_stable(name)} {arms[name].phrase}{top}")
    return f"Largest stable learning rate: {join(parts)}."


def _said_guessing(summary: Summary, grid: Grid, arms: dict[str, Arm]) -> str:
    parts = [
        f"{arms[one.arm].phrase} at learning rate {number(one.lr)} ({summary.show(one.final.mean)})"
        for one in summary.outcomes
        if one.guessing and one.final
    ]
    if not parts or grid.guessing is None:
        return ""
    chance = f"{summary.show(grid.guessing)} for {number(1 / grid.guessing)} classes"
    return f"No better than guessing ({chance}) in the end: {join(parts)}."


def _said_best(summary: Summary, arms: dict[str, Arm]) -> str:
    parts = []
    for name, rate in summary.best_rate.items():
        final = summary.outcome(name, rate).final if rate is not None else None
        if rate is not None and final:
            parts.append(
                f"{_final(summary, final)} {arms[name].phrase} (learning rate {number(rate)})"
            )
    if len(summary.rates) < 2 or not parts:
        return ""
    return f"Each at the learning rate that suited it best: {join(parts)}."
