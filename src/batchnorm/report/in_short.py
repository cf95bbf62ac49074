"""What opens the page: cards with the figures wanted first, sentences, and a table of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

from batchnorm.report.grid import Arm, Grid
from batchnorm.report.summary import Outcome, Spread, Summary
from batchnorm.report.words import count, join, number, plural, seeds_of, span

__all__ = ["in_short"]


def in_short(grid: Grid, summary: Summary) -> str:
    """The section "In short"."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary.sentences)
    if not summary.any_ended:
        sentences += "<li>No training run has ended yet, so there are no final figures.</li>"
    cards = "".join(_cards(grid, summary))
    return (
        '<section id="headline" aria-labelledby="headline-title">'
        '<h2 id="headline-title">In short</h2>'
        f'<div class="cards">{cards}</div><ul class="findings">{sentences}</ul>'
        f"{_outcome_table(grid, summary)}</section>"
    )


def _card(title: str, rows: Iterable[tuple[int, Arm, str, str]]) -> str:
    items = "".join(
        f'<li><span class="swatch" style="--arm:var(--arm-{i})"></span>'
        f'<span class="who">{escape(arm.label)}</span><strong>{escape(figure)}</strong>'
        f"<small>{escape(note)}</small></li>"
        for i, arm, figure, note in rows
    )
    return f'<div class="card"><h3>{escape(title)}</h3><ul>{items}</ul></div>' if items else ""


def _over_seeds(spread: Spread, show: Callable[[float], str]) -> str:
    if len(spread.seeds) == 1:
        return "one seed"
    low, high = show(spread.low), show(spread.high)
    if low == high:
        return seeds_of(len(spread.seeds), len(spread.seeds))
    return f"{low} to {high} over {len(spread.seeds)} seeds"


def _to_target(summary: Summary, arm: Arm, rate: float) -> tuple[str, str] | None:
    """Steps to the reference's best: a figure and how it varies."""
    reference = summary.reference or ""
    if arm.name == reference:
        own = summary.outcome(arm.name, rate).steps_to_best
        return (count(own.median), _over_seeds(own, count)) if own else None
    race = summary.race(arm.name, reference, rate)
    if race is None:
        return None
    missed = f"not reached with {plural(len(race.missed), 'seed')}" if race.missed else ""
    if race.median is None or race.reached is None:
        return "not reached", missed
    return count(race.median), missed or _over_seeds(race.reached, count)


def _cards(grid: Grid, summary: Summary) -> Iterable[str]:
    rate = summary.reference_rate
    if rate is None:
        return
    reference = next(arm for arm in grid.arms if arm.name == summary.reference)
    best = summary.outcome(reference.name, rate).best
    arms = list(enumerate(grid.arms))
    several = len(grid.rates) > 1
    if best and len(arms) > 1:
        yield _card(
            f"Steps to the best {summary.measure} {reference.phrase} "
            f"({summary.show(best.mean)}, learning rate {number(rate)})",
            ((i, arm, *figure) for i, arm in arms if (figure := _to_target(summary, arm, rate))),
        )
    finals = []
    for i, arm in arms:
        own = summary.best_outcome(arm.name)
        if own and own.final:
            where = f", learning rate {number(own.lr)}" if several else ""
            note = _over_seeds(own.final, summary.show) + where
            finals.append((i, arm, summary.show(own.final.mean), note))
    each = ", each at its own best learning rate" if several else ""
    yield _card(f"Final {summary.measure}{each}", finals)
    if several and summary.any_ended:
        rates = join([number(rate) for rate in grid.rates])

        def judged(arm: Arm) -> str:
            top = summary.largest_stable[arm.name]
            lost = top is not None and summary.outcome(arm.name, top).guessing
            return f"{'no better than guessing there; ' if lost else ''}of {rates} tried"

        yield _card(
            "Largest stable learning rate",
            ((i, arm, summary.shown_stable(arm.name), judged(arm)) for i, arm in arms),
        )


def _outcome_table(grid: Grid, summary: Summary) -> str:
    if not summary.any_ended:
        return ""
    reference = next(arm for arm in grid.arms if arm.name == summary.reference)
    rows = []
    for rate in grid.rates:
        for i, arm in enumerate(grid.arms):
            one = summary.outcome(arm.name, rate)
            target = _to_target(summary, arm, rate)
            cells = [
                f"{target[0]}|{target[1]}" if target else "–",
                _mean_and_range(one.final, summary),
                _mean_and_range(one.best, summary),
                {True: "yes", False: "no", None: "not finished"}[one.stable]
                + ("|no better than guessing" if one.guessing else ""),
                _seeds_diverged(one),
            ]
            first = f'<th scope="rowgroup" rowspan="{len(grid.arms)}">{number(rate)}</th>'
            rows.append(
                f"<tr>{first if i == 0 else ''}<th scope='row'><span class='swatch' "
                f"style='--arm:var(--arm-{i})'></span>{escape(arm.label)}</th>"
                f"{''.join(_table_cell(cell) for cell in cells)}</tr>"
            )
    every = summary.measured_every
    stride = f" (measured every {plural(every, 'step')})" if every else ""
    heads = [
        "learning rate",
        "network",
        f"steps to the best {summary.measure} {reference.phrase}",
        f"final {summary.measure}",
        f"best {summary.measure}",
        "stable",
        "diverged",
    ]
    header = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="All figures">'
        f"<table><caption>All learning rates. Steps: median and range over the seeds{stride}; "
        "final and best: mean and range. Stable: every seed ended with a training loss below "
        f"that of the best answer that ignores the input.</caption><thead><tr>{header}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table_cell(text: str) -> str:
    figure, _, note = text.partition("|")
    return f"<td>{escape(figure)}{f'<small>{escape(note)}</small>' if note else ''}</td>"


def _mean_and_range(spread: Spread | None, summary: Summary) -> str:
    return f"{summary.show(spread.mean)}|{_over_seeds(spread, summary.show)}" if spread else "–"


def _seeds_diverged(one: Outcome) -> str:
    if not one.diverged:
        return "no" if one.ended else "–"
    steps = sorted(one.diverged.values())
    return f"{len(one.diverged)} of {one.planned}|step {span(count(steps[0]), count(steps[-1]))}"
