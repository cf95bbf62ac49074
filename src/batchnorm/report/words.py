"""Numbers and lists in words, the same everywhere in the report."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = [
    "count",
    "join",
    "number",
    "percent",
    "plural",
    "ratio",
    "seeds_of",
    "span",
    "steps_span",
    "times",
]


def number(value: float, digits: int = 3) -> str:
    """Up to ``digits`` significant digits, without a needless exponent."""
    size = abs(value)
    if size >= 10**digits and size < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}%"


def count(value: float) -> str:
    """A number of steps; halves come from medians."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def plural(amount: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def join(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def span(low: str, high: str) -> str:
    """``low to high``, or the one value when both read alike."""
    return low if low == high else f"{low} to {high}"


def steps_span(steps: Collection[int]) -> str:
    """``step 5``, ``steps 5 to 12``."""
    first, last = min(steps), max(steps)
    return f"step{'' if first == last else 's'} {span(count(first), count(last))}"


def seeds_of(some: int, every: int) -> str:
    """``in all 3 seeds``, ``in both seeds``, ``in 2 of 3 seeds``."""
    if some == every:
        return {1: "with the one seed", 2: "in both seeds"}.get(every, f"in all {every} seeds")
    return f"in {some} of {every} seeds"


def ratio(value: float) -> str:
    """How many times: two digits are all that a comparison deserves."""
    return number(float(f"{value:.2g}"), 2)


def times(value: float) -> str:
    """A ratio of two counts in words; never more than the numbers say."""
    if 0.95 <= value <= 1.05:
        return "about as many"
    fewer = ", so fewer" if value < 1 else ""
    return f"{ratio(value)} times as many{fewer}"
