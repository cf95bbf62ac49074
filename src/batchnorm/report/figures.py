"""The figures a reader wants first, computed from a run and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

from batchnorm.records import Cell
from batchnorm.report.grid import Arm, Grid
from batchnorm.report.summary import Outcome, Race, Spread, Summary

__all__ = ["figures_of", "probe_seconds"]


def figures_of(grid: Grid) -> Summary:
    """Compute the headline of a run, without its sentences.

    The measure is the test accuracy, or the test loss for tasks that have no accuracy. Cells that
    have not ended count for nothing but the progress.
    """
    accuracy = grid.has("test/accuracy")
    quantity, sign = ("test/accuracy", 1) if accuracy else ("test/loss", -1)
    outcomes = [_outcome(grid, arm, lr, quantity, sign) for lr in grid.rates for arm in grid.arms]
    races = [
        race
        for lr in grid.rates
        for arm in grid.arms
        for other in grid.arms
        if arm != other and (race := _race(grid, arm, other, lr, quantity, sign))
    ]
    names = [arm.name for arm in grid.arms]
    reference = next((name for name in ("none", *names) if name in names), None)
    own = {name: [one for one in outcomes if one.arm == name] for name in names}
    best = {name: _best_rate(own[name], sign) for name in names}
    started = [rate for rate in grid.rates if any(grid.at(arm, rate) for arm in grid.arms)]
    at = best[reference] if reference else None
    return Summary(
        study=grid.study,
        measure="test accuracy" if accuracy else "test loss",
        measured_every=_stride(grid, quantity),
        higher_is_better=accuracy,
        arms=names,
        reference=reference,
        rates=grid.rates,
        reference_rate=at if at is not None else next(iter(started), None),
        cells=_progress(grid),
        outcomes=outcomes,
        races=races,
        largest_stable={
            name: max((one.lr for one in own[name] if one.stable), default=None) for name in names
        },
        best_rate=best,
        probe_share=_probe_share(grid.cells),
    )


def probe_seconds(cell: Cell) -> dict[str, float]:
    """Seconds that each probe took: what the timing holds beside the training and the total."""
    timing = cell.manifest["timing"]
    return {name: float(s) for name, s in timing.items() if name not in ("train", "total")}


def _probe_share(cells: Sequence[Cell]) -> float | None:
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


def _best_rate(outcomes: Sequence[Outcome], sign: int) -> float | None:
    """The learning rate with the best final mean, of those at which no seed diverged."""
    final = {one.lr: sign * one.final.mean for one in outcomes if one.final and not one.diverged}
    return max(final, key=lambda lr: final[lr]) if final else None


def _measured(cell: Cell, quantity: str) -> dict[int, float]:
    """The finite values of a quantity by step."""
    return {step: v for step, v in cell.series(quantity).items() if math.isfinite(v)}


def _stable(cell: Cell) -> bool | None:
    if not cell.ended:
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
    cells = [cell for cell in grid.at(arm, lr) if cell.ended]
    for cell in cells:
        seed = int(cell.settings["seed"])
        stable.append(_stable(cell))
        if cell.manifest["state"] == "diverged":
            diverged[seed] = int(cell.manifest["step"])
            continue
        values = _measured(cell, quantity)
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
    runners = {int(cell.settings["seed"]): cell for cell in grid.at(arm, lr) if cell.ended}
    targets, own, steps, missed = {}, {}, {}, []
    for cell in grid.at(other, lr):
        seed, values = int(cell.settings["seed"]), _measured(cell, quantity)
        # A network that diverged set no mark worth reaching, and pairs need both seeds.
        if cell.manifest["state"] != "done" or seed not in runners or not values:
            continue
        step, target = _best(values, sign)
        targets[seed], own[seed] = target, float(step)
        reached = [
            at
            for at, value in _measured(runners[seed], quantity).items()
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
