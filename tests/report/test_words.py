"""Numbers in words."""

import pytest

from batchnorm.report import words


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.1, "0.1"),
        (-1.2345, "−1.23"),
        (1234.5, "1,234"),
        (1.7e-5, "1.7e−5"),
        (1.24e8, "1.24e8"),
        (8.1e12, "8.1e12"),
    ],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (6.25, "6.2 times as many"),
        (2853.0, "2,900 times as many"),
        (1.04, "about as many"),
        (0.97, "about as many"),
        (0.5, "0.5 times as many, so fewer"),
    ],
)
def test_a_ratio_says_no_more_than_it_is(value: float, shown: str) -> None:
    assert words.times(value) == shown
