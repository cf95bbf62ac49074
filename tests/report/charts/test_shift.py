"""Internal covariate shift."""

from __future__ import annotations

import pytest
from tests.report.runs import Builder, charts_of

from batchnorm.records import Record


@pytest.mark.parametrize(
    ("cosines", "said"),
    [((0.9, 0.4), "larger with batch norm than without normalization"), ((0.5, 0.5), "about the")],
)
def test_the_shift_is_compared_as_it_was_measured(
    builder: Builder, cosines: tuple[float, float], said: str
) -> None:
    for norm, cosine in zip(("none", "batch"), cosines, strict=True):
        records = [Record(s, "fc2", "shift/cosine", cosine) for s in (0, 10)]
        records += [Record(s, "fc1", "shift/cosine", 1.0) for s in (0, 10)]
        builder.cell(norm, 0.1, 0, records)
    assert said in charts_of(builder)["shift-cosine"].finding(0)
