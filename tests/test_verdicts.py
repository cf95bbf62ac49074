"""The rule of the verdicts, against scipy and against cases decided by hand."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from tests.tolerances import DOUBLE

from batchnorm.records import Run
from batchnorm.verdicts import (
    Above,
    Below,
    CannotTellError,
    Claim,
    Within,
    interval,
    judge,
    t_quantile,
)


@given(st.integers(1, 60), st.floats(0.6, 0.999))
def test_quantiles_are_those_of_students_distribution(df: int, share: float) -> None:
    assert t_quantile(share, df) == pytest.approx(t.ppf(share, df), rel=DOUBLE)


# In steps of 2⁻¹⁰: nearer to each other, scipy divides by a spread that underflows.
@given(
    st.lists(st.integers(-10240, 10240).map(lambda n: n / 1024), min_size=2, max_size=8).filter(
        lambda v: len(set(v)) > 1
    )
)
def test_intervals_are_scipys(effects: list[float]) -> None:
    mean = sum(effects) / len(effects)
    spread = (sum((e - mean) ** 2 for e in effects) / (len(effects) - 1) / len(effects)) ** 0.5
    low, high = t.interval(0.95, len(effects) - 1, mean, spread)
    found = interval(effects)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=DOUBLE)


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ([5.0, 5.1, 4.9], "holds"),
        ([1.0, 1.1, 0.9], "holds weakly"),
        ([-1.0, -1.1, -0.9], "does not hold"),
        ([0.0, 0.0, 0.0], "does not hold"),
        ([1.0, 9.0, -4.0], "cannot tell at this scale"),
    ],
)
def test_above_and_below_mirror_each_other(effects: list[float], verdict: str) -> None:
    assert Above(2.0, null=0.0).decide(effects) == verdict
    assert Below(-2.0, null=0.0).decide([-effect for effect in effects]) == verdict


def test_ratios_weigh_twice_and_half_the_same() -> None:
    assert interval([0.5, 2.0], ratio=True).mean == pytest.approx(1.0, rel=DOUBLE)
    assert Above(2.0, null=1.0).decide([4.0, 4.2, 3.9], ratio=True) == "holds"
    assert Below(0.5, null=1.0).decide([0.25, 0.24, 0.26], ratio=True) == "holds"


def claim(effects: dict[int, float] | Exception, **more: object) -> Claim:
    def measure(run: Run) -> dict[int, float]:
        if isinstance(effects, Exception):
            raise effects
        return effects

    fields = dict.fromkeys(("id", "sentence", "source", "reported", "effect"), "x")
    return Claim(**{"measure": measure, "rule": Above(1.0), **fields, **more})


RUN = Run(Path(), {"scale": "quick"}, ())


def test_what_cannot_be_told_says_why() -> None:
    cases = [
        (claim({}), "Nothing that could decide"),
        (claim({0: 2.0}), "One seed gives no interval"),
        (claim({0: 2.0, 1: math.nan}), "Not a finite number for seed 1"),
        (claim({0: 2.0, 1: 2.0}, full_only="of the data"), "Needs --scale full: of the data"),
        (claim(CannotTellError("No such step")), "No such step."),
    ]
    for one, note in cases:
        verdict = judge(one, RUN)
        assert verdict.verdict == "cannot tell at this scale"
        assert note in verdict.note
        json.dumps(verdict.document(), allow_nan=False)
    assert judge(claim({0: 2.0, 1: 2.0}), RUN).verdict == "holds"


def test_identities_hold_for_every_seed_or_not() -> None:
    assert judge(claim({0: 1e-16}, rule=Within(1e-15)), RUN).verdict == "holds"
    verdict = judge(claim({0: 0.0, 1: -2e-15}, rule=Within(1e-15)), RUN)
    assert verdict.verdict == "does not hold"
    assert verdict.measured == "at most 2e−15, 2 seeds"
