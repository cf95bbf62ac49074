"""The bias of a small run, against what follows without running it."""

import pytest
from tests.tolerances import DOUBLE

from batchnorm.records import Run
from batchnorm.studies.library.bias import LINES, STUDY
from batchnorm.studies.run_study import plan_study, run_studies, settings_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("bias") / "run"
    settings = settings_of(STUDY, "quick", {"steps": 100, "seeds": 2})
    (run,), interrupted = run_studies([plan_study(STUDY, settings, out)], out)
    assert not interrupted
    return run


def test_alone_the_bias_grows_in_a_straight_line_and_the_loss_stands_still(run: Run) -> None:
    for cell in run.by_seed(line="alone").values():
        norms = cell.series("bias/norm")
        slope = norms[max(norms)] / max(norms)
        assert norms == pytest.approx({step: slope * step for step in norms}, rel=DOUBLE)
        losses = cell.series("bias/loss")
        assert losses == pytest.approx(dict.fromkeys(losses, losses[0]), rel=DOUBLE)


def test_without_ignoring_anything_it_stays_at_zero(run: Run) -> None:
    for cell in run.by_seed(line="through").values():
        assert max(cell.series("bias/norm").values()) < DOUBLE
        assert max(cell.series("bias/gradient").values()) < DOUBLE
        losses = cell.series("bias/loss")
        assert losses[max(losses)] < losses[0]  # the rest does learn


def test_the_verdicts_that_follow_from_that(run: Run) -> None:
    verdicts = {verdict.claim: verdict.verdict for verdict in STUDY.verdicts(run)}
    assert [verdicts[name] for name in ("zero-gradient", "no-effect", "grows")] == ["holds"] * 3
    for chart in STUDY.figures(run):
        assert len(chart.panels[0].lines) == len(LINES)
