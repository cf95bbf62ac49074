"""The headline: what a reader wants to know first, in sentences made of figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from batchnorm.records import Run
from batchnorm.report.figures import figures_of
from batchnorm.report.grid import Arm, Grid
from batchnorm.report.summary import Race, Spread, Summary
from batchnorm.report.words import (
    count,
    join,
    number,
    percent,
    plural,
    seeds_of,
    span,
    steps_span,
    times,
)

__all__ = ["summarize"]


def summarize(run: Run) -> Summary:
    """Compute the headline of a run.

    The measure is the test accuracy, or the test loss for tasks that have no accuracy. Cells that
    have not ended count for nothing but the progress.
    """
    grid = Grid(run)
    summary = figures_of(grid)
    return replace(summary, sentences=_sentences(summary, grid))


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


def _said_race(summary: Summary, race: Race, arms: Mapping[str, Arm]) -> str:
    arm, other = arms[race.arm], arms[race.other]
    seeds = len(race.target.seeds)
    average = "" if seeds == 1 else " on average"
    mark = (
        f"the best {summary.measure} of {other.network} ({summary.show(race.target.mean)}{average})"
    )
    start = f"At learning rate {number(race.lr)}, {arm.network}"
    spread = race.reached
    if spread is None:
        return f"{start} did not reach {mark} {seeds_of(seeds, seeds)}."
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


def _said_final(summary: Summary, rate: float, arms: Mapping[str, Arm]) -> str:
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


def _said_diverged(summary: Summary, arms: Mapping[str, Arm]) -> str:
    parts = []
    for one in summary.outcomes:
        if one.diverged:
            when = steps_span(one.diverged.values())
            share = seeds_of(len(one.diverged), one.planned)
            parts.append(
                f"{arms[one.arm].phrase} at learning rate {number(one.lr)} {share} ({when})"
            )
    if parts:
        return f"Training diverged (the loss was no longer a number) {join(parts)}."
    return "No training run diverged." if summary.cells["done"] else ""


def _said_stable(summary: Summary, arms: Mapping[str, Arm]) -> str:
    if len(summary.rates) < 2 or not summary.any_ended:
        return ""
    parts = []
    for name in summary.arms:
        top = " (the largest tried)" if summary.largest_stable[name] == summary.rates[-1] else ""
        parts.append(f"{summary.shown_stable(name)} {arms[name].phrase}{top}")
    return f"Largest stable learning rate: {join(parts)}."


def _said_guessing(summary: Summary, grid: Grid, arms: Mapping[str, Arm]) -> str:
    parts = [
        f"{arms[one.arm].phrase} at learning rate {number(one.lr)} ({summary.show(one.final.mean)})"
        for one in summary.outcomes
        if one.guessing and one.final
    ]
    if not parts or grid.guessing is None:
        return ""
    chance = f"{summary.show(grid.guessing)} for {number(1 / grid.guessing)} classes"
    return f"No better than guessing ({chance}) in the end: {join(parts)}."


def _said_best(summary: Summary, arms: Mapping[str, Arm]) -> str:
    parts = [
        f"{_final(summary, best.final)} {arm.phrase} (learning rate {number(best.lr)})"
        for name, arm in arms.items()
        if (best := summary.best_outcome(name)) and best.final
    ]
    if len(summary.rates) < 2 or not parts:
        return ""
    return f"Each at the learning rate that suited it best: {join(parts)}."


def _over(spread: Spread, shown: str, low: str, high: str) -> str:
    """``shown`` with its range over the seeds, where there is one."""
    if len(spread.seeds) == 1:
        return shown
    same = f"the same {seeds_of(len(spread.seeds), len(spread.seeds))}"
    return f"{shown} ({same if low == high else span(low, high)})"


def _final(summary: Summary, spread: Spread) -> str:
    show = summary.show
    return _over(spread, show(spread.mean), show(spread.low), show(spread.high))
