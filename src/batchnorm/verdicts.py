"""Verdicts: whether a claim holds, decided from records by a stated rule and never by eye.

A claim says how a number is taken from the records of each seed, its *effect* e_s, and by which
rule it is judged.

**Intervals.** Over n seeds with mean ē and standard deviation s (n − 1 in the denominator), the
interval is ē ± t·s/√n, t being the 97.5 % quantile of Student's distribution with n − 1 degrees of
freedom: the usual 95 % confidence interval of a mean. :class:`Above` compares it with a
``threshold``, what the paper's words demand, and with a ``null`` (by default the same), what no
effect at all would give:

======================  ============================================================
holds                   the whole interval lies above ``threshold``
holds weakly            the whole interval lies above ``null``, but not above ``threshold``:
                        the direction is certain, the size is not
does not hold           the whole interval lies at or below ``null``
cannot tell at this     otherwise, with fewer than two seeds, where a seed has no finite
scale                   effect, or where the claim names a reason why this scale cannot
======================  ============================================================

An effect that is a ratio is judged by its logarithm, so that twice as much and half as much weigh
the same: mean and interval are then geometric. :class:`Below` is the same with every sign turned.
:class:`Within` is for identities and for deterministic calculations: the claim holds where
|e_s| ≤ ``tolerance`` for every seed, and does not hold otherwise; one seed is enough.

Nothing here needs torch or numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from batchnorm.records import Run

__all__ = [
    "Above",
    "Below",
    "CannotTellError",
    "Claim",
    "Interval",
    "Verdict",
    "Within",
    "judge",
    "t_quantile",
]

Decision = Literal["holds", "holds weakly", "does not hold", "cannot tell at this scale"]
CANNOT_TELL: Decision = "cannot tell at this scale"


class CannotTellError(Exception):
    """Raised by a claim's measure: these records cannot answer it; the message says why."""


@dataclass(frozen=True)
class Interval:
    """The mean of an effect over its seeds, with its confidence interval."""

    mean: float
    low: float
    high: float
    seeds: int


def _t_below(t: float, df: int) -> float:
    """P(T ≤ t) for t ≥ 0: the finite sums of Abramowitz & Stegun 26.7.3–4."""
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    both = math.sin(angle) * total
    if odd:
        both = (angle + both) * 2 / math.pi
    return 0.5 + both / 2


def t_quantile(share: float, df: int) -> float:
    """Quantile of Student's t distribution with ``df`` degrees of freedom, for shares above ½.

    Example:
        >>> round(t_quantile(0.975, 2), 3)
        4.303
    """
    low, high = 0.0, 1.0
    while _t_below(high, df) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, df) < share else (low, middle)
    return high


def interval(effects: Sequence[float], *, ratio: bool = False) -> Interval:
    """The 95 % confidence interval of the mean; of a single effect its width is not known.

    With ``ratio``, of the geometric mean of positive effects.
    """
    if ratio:
        span = interval([math.log(effect) for effect in effects])
        return Interval(math.exp(span.mean), math.exp(span.low), math.exp(span.high), span.seeds)
    mean, n = fmean(effects), len(effects)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = t_quantile(0.975, n - 1) * stdev(effects) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Above:
    """The effect is above ``threshold``; above ``null`` (default: the same) it holds weakly."""

    threshold: float
    null: float | None = None

    def decide(self, effects: Sequence[float], *, ratio: bool = False) -> Decision:
        """Apply the rule of this module's docstring."""
        span = interval(effects, ratio=ratio)
        null = self.threshold if self.null is None else self.null
        if span.low > self.threshold:
            return "holds"
        if span.low > null:
            return "holds weakly"
        return "does not hold" if span.high <= null else CANNOT_TELL


@dataclass(frozen=True)
class Below:
    """The effect is below ``threshold``; below ``null`` (default: the same) it holds weakly."""

    threshold: float
    null: float | None = None

    def decide(self, effects: Sequence[float], *, ratio: bool = False) -> Decision:
        """Apply the rule of this module's docstring."""
        span = interval(effects, ratio=ratio)
        null = self.threshold if self.null is None else self.null
        if span.high < self.threshold:
            return "holds"
        if span.high < null:
            return "holds weakly"
        return "does not hold" if span.low >= null else CANNOT_TELL


@dataclass(frozen=True)
class Within:
    """The effect is at most ``tolerance`` in absolute value, for every seed."""

    tolerance: float

    def decide(self, effects: Sequence[float], *, ratio: bool = False) -> Decision:
        """Apply the rule of this module's docstring."""
        within = all(abs(effect) <= self.tolerance for effect in effects)
        return "holds" if within else "does not hold"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper and how it is decided.

    ``measure`` takes the effect of each seed from a run; seeds whose cells have not ended are left
    out by :meth:`batchnorm.records.Run.by_seed`. ``effect`` says in words what the effect is.
    ``full_only`` is the reason why a scale other than ``full`` cannot decide the claim, where
    there is one. ``figures`` are ids of the charts that show it.
    ``ratio``: the effect is a ratio; ``percent``: it is shown as a percentage.
    """

    id: str
    sentence: str
    source: str
    reported: str
    effect: str
    measure: Callable[[Run], Mapping[int, float]]
    rule: Above | Below | Within
    figures: tuple[str, ...] = ()
    full_only: str = ""
    note: str = ""
    percent: bool = False
    ratio: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a run says of a claim."""

    claim: str
    sentence: str
    source: str
    reported: str
    effect: str
    effects: dict[int, float]
    interval: Interval | None
    """Of the mean; ``None`` for identities, which are judged by the largest effect."""
    verdict: Decision
    note: str
    figures: tuple[str, ...]
    percent: bool

    def document(self) -> dict[str, Any]:
        """The verdict as JSON values: what is not finite becomes ``None``."""
        document = asdict(self)
        if self.interval is not None:
            document["interval"] = {
                name: value if math.isfinite(value) else None
                for name, value in asdict(self.interval).items()
            }
        document["effects"] = {
            str(seed): value if math.isfinite(value) else None
            for seed, value in self.effects.items()
        }
        return document

    @property
    def measured(self) -> str:
        """The effect with its interval and the number of seeds."""
        if not self.effects:
            return "–"
        show, n = _percent if self.percent else _number, len(self.effects)
        seeds = f"{n} seed{'' if n == 1 else 's'}"
        if self.interval is None:
            return f"at most {show(max(map(abs, self.effects.values())))}, {seeds}"
        span = self.interval
        where = f" [{show(span.low)}, {show(span.high)}]" if n > 1 else ""
        return f"{show(span.mean)}{where}, {seeds}"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", "−")


def judge(claim: Claim, run: Run) -> Verdict:
    """Decide a claim from the records of a run, by the rule in this module's docstring."""
    notes = [claim.note] if claim.note else []
    effects: dict[int, float] = {}
    decision: Decision = CANNOT_TELL
    reason = "Nothing that could decide it has been measured."
    try:
        effects = dict(sorted(claim.measure(run).items()))
    except CannotTellError as error:
        reason = f"{error}."
    values = list(effects.values())
    finite = all(map(math.isfinite, values))
    if claim.full_only and run.study.get("scale") != "full":
        notes.append(f"Needs --scale full: {claim.full_only}.")
    elif not values:
        notes.append(reason)
    elif not finite:
        lost = ", ".join(str(seed) for seed, v in effects.items() if not math.isfinite(v))
        notes.append(f"Not a finite number for seed {lost}.")
    elif len(values) < 2 and not isinstance(claim.rule, Within):
        notes.append("One seed gives no interval.")
    else:
        decision = claim.rule.decide(values, ratio=claim.ratio)
    return Verdict(
        claim=claim.id,
        sentence=claim.sentence,
        source=claim.source,
        reported=claim.reported,
        effect=claim.effect,
        effects=effects,
        interval=(
            interval(values, ratio=claim.ratio)
            if values and finite and not isinstance(claim.rule, Within)
            else None
        ),
        verdict=decision,
        note=" ".join(notes),
        figures=claim.figures,
        percent=claim.percent,
    )
