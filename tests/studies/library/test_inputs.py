"""The effects of inputs on numbers made up for them, and a run of a few steps."""

from pathlib import Path

import pytest
from tests.studies.library.made_up import cell, run

from batchnorm.records import Run
from batchnorm.studies.library.inputs import (
    STUDY,
    _best,
    _features,
    _gain,
    _less_spread,
    _off_theory,
    _ratio,
)
from batchnorm.studies.library.inputs import QuadraticCell as Quadratic
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.verdicts import CannotTellError


def trained(norm, scaling, accuracy, **settings):
    return cell(norm, {"test/accuracy": {0: 0.1, 9: accuracy}}, scaling=scaling, **settings)


def test_each_scaling_is_judged_at_its_best_rate() -> None:
    both = run(
        trained("none", "raw", 0.7, lr=0.1),
        trained("none", "raw", 0.8, lr=1.0),
        trained("none", "standardize", 0.9, lr=0.1),
        trained("none", "standardize", 0.2, lr=1.0),
    )
    assert _best(both, "none", "raw") == {0: 0.8}
    assert _gain(both, "raw") == pytest.approx({0: 0.1})


def test_the_spread_over_the_scalings() -> None:
    def of(norm, *accuracies):
        return [
            trained(norm, s, a)
            for s, a in zip(("raw", "standardize", "skewed"), accuracies, strict=True)
        ]

    found = _less_spread(run(*of("none", 0.7, 0.9, 0.6), *of("batch", 0.92, 0.9, 0.91)))
    assert found == pytest.approx({0: 0.28})
    with pytest.raises(CannotTellError, match="makes no difference"):
        _less_spread(run(*of("none", 0.9, 0.9, 0.9), *of("batch", 0.92, 0.9, 0.91)))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("inputs") / "run"
    settings = settings_of(STUDY, "quick", {"steps": 4, "every": 2, "seeds": 2, "lr": (0.1,)})
    (done,), interrupted = run_studies([plan_study(STUDY, settings, out)], out)
    assert not interrupted
    return done


def test_two_features_cost_what_their_moments_say(short: Run) -> None:
    # The Hessian of 1, U(0, 1), U(0, 2000) in expectation has the condition number 2.133e7: by
    # numpy from the moments 1/2 and 1/3. A thousand examples leave it some per cent.
    found = {
        s: c.series("descent/condition")[0]
        for s, c in short.by_seed(data="two", scaling="raw").items()
    }
    assert found == pytest.approx(dict.fromkeys((0, 1), 2.133e7), rel=0.15)
    assert all(1e7 < ratio < 1e8 for ratio in _ratio(short, "two", "steps").values())
    assert max(_off_theory(short).values()) < 1e-6


def test_a_regression_knows_its_own_half_of_the_task(short: Run) -> None:
    one, other = (
        _features(Quadratic(data="task", scaling="raw", seed=seed, task="digits"))
        for seed in (0, 1)
    )
    assert one.shape == other.shape == (719, 64)
    assert one.max() == 16
    assert (one != other).any()


def test_a_short_run_is_judged_and_drawn(short: Run) -> None:
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(short)}
    assert verdicts["theory"].verdict == "holds"
    assert all(set(verdict.effects) == {0, 1} for verdict in verdicts.values())
    drawn = {chart.id for chart in STUDY.figures(short) if chart.panels}
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= drawn


def test_cells_that_are_not_there_yet_are_no_error(tmp_path: Path) -> None:
    plan = plan_study(STUDY, settings_of(STUDY, "quick", {}), tmp_path / "run")
    empty = Run(tmp_path, plan.document(), ())
    assert [chart for chart in STUDY.figures(empty) if chart.panels] == []
    assert {v.verdict for v in STUDY.verdicts(empty)} == {"cannot tell at this scale"}
