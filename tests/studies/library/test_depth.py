"""The effects of depth on gradients and losses made up for it, and a run of a few steps."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from tests.studies.library.made_up import cell

from batchnorm.records import Cell, Record, Run
from batchnorm.studies.depths import by_depth, learned
from batchnorm.studies.library import depth as study
from batchnorm.studies.library.depth import RELU_FACTOR, STUDY
from batchnorm.studies.run_study import plan_study, run_studies, settings_of
from batchnorm.studies.settings import SettingsError
from batchnorm.verdicts import CannotTellError


def drawn(activation: str, norm: str, *draws: list[float]) -> Cell:
    """Gradients from the inputs to the last layer."""
    records = [
        Record(draw, "", "depth/gradient", value, layer)
        for draw, norms in enumerate(draws)
        for layer, value in enumerate(norms)
    ]
    settings = {"activation": activation, "norm": norm, "seed": 0, "layers": len(draws[0]) - 1}
    return Cell(Path(), {"settings": settings, "state": "done", "step": 2}, tuple(records))


def trained(norm: str, depth: int, loss: float, *, lr: float = 0.1) -> Cell:
    """Loses so much on the last fifth of 10 steps, of a loss of guessing of 2."""
    made = cell(norm, {"batch/loss": {0: 9.0, 7: 9.0, 8: loss, 10: loss}}, depth=depth, lr=lr)
    made.manifest["task"].update(constant_loss=2.0, batch_size=4)
    return made


def run(*cells: Cell) -> Run:
    return Run(Path(), {"scale": "full", "cells": [c.settings for c in cells]}, cells)


def test_decades_and_factors_leave_the_inputs_out() -> None:
    vanishing = drawn("tanh", "none", [7.0, 1e-4, 1e-2, 1.0], [7.0, 1e-2, 1e-1, 1.0])
    assert study._lost(run(vanishing), "tanh", "none") == pytest.approx({0: 3.0})
    assert study._factors(vanishing) == pytest.approx([(1e-4 + 1e-2) / 2] * 2)
    assert study._relative(vanishing) == pytest.approx([1e-3, 10**-1.5, 1.0])


def test_the_theory_itself_is_not_off() -> None:
    step = math.sqrt(RELU_FACTOR)
    exact = run(drawn("relu", "batch", [0.0, step**3, step**2, step, 1.0]))
    assert study._gained(exact) == pytest.approx({0: 1.0})
    assert study._off(exact) == pytest.approx({0: 0.0})
    others = [drawn(a, "batch", [0.0, 0.01, 1.0]) for a in ("sigmoid", "tanh")]
    assert study._most_lost(run(*exact.cells, *others)) == pytest.approx({0: 2.0})


def test_what_is_learned_is_a_share_of_the_loss_of_guessing() -> None:
    assert learned(trained("none", 2, 0.5)) == pytest.approx(0.75)
    numbers = trained("none", 2, 4.0)
    numbers.manifest["task"]["kind"] = "regression"  # summed over 4 examples
    assert learned(numbers) == pytest.approx(0.5)
    assert learned(replace(numbers, manifest=numbers.manifest | {"state": "diverged"})) == -math.inf


def test_the_best_rate_counts_and_seeds_must_be_complete() -> None:
    cells = [trained("none", d, loss, lr=r) for d, loss, r in [(2, 1, 0.1), (2, 0.2, 1), (9, 2, 1)]]
    assert by_depth(run(*cells, trained("none", 9, 1.8)), "none") == {
        0: pytest.approx({2: 0.9, 9: 0.1})
    }
    missing = Run(Path(), run(*cells, trained("none", 9, 1.8)).study, tuple(cells))
    assert by_depth(missing, "none") == {}


def test_how_much_deeper_and_what_too_deep_costs() -> None:
    plain = [trained("none", d, loss) for d, loss in [(2, 0.1), (5, 1.5), (20, 2)]]
    normed = [trained("batch", d, loss) for d, loss in [(2, 0.2), (5, 0.1), (20, 0.9)]]
    both = run(*plain, *normed)
    assert study._deeper(both) == {0: 10.0}
    assert study._too_deep(both) == pytest.approx({0: 0.4})
    with pytest.raises(CannotTellError, match="none of these depths"):
        study._deeper(run(*normed, *(trained("none", d, 2) for d in (2, 5, 20))))


def test_a_short_run_is_judged_and_drawn(tmp_path: Path) -> None:
    changes = {"layers": 6, "units": 40, "batch": 40, "depths": (1, 2), "steps": 5, "every": 1}
    settings = settings_of(STUDY, "quick", changes | {"seeds": 2, "width": 8})
    (done,), _ = run_studies([plan_study(STUDY, settings, tmp_path / "run")], tmp_path / "run")
    verdicts = {verdict.claim: verdict for verdict in STUDY.verdicts(done)}
    assert verdicts.keys() - {"deeper"} == {
        claim for claim, verdict in verdicts.items() if verdict.effects.keys() == {0, 1}
    } - {"deeper"}
    assert min(verdicts["sigmoid-vanishes"].effects.values()) > 5 * math.log10(4)
    charts = STUDY.figures(done)
    assert {figure for claim in STUDY.claims for figure in claim.figures} <= {c.id for c in charts}
    assert [[len(panel.lines) for panel in chart.panels] for chart in charts] == [[2] * 3] * 2 + [
        [2]
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 4}, "Give depths="),
        ({"model": "module:net"}, "only the built-in ones"),
    ],
)
def test_settings_that_contradict_the_study(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        STUDY.check(settings_of(STUDY, "quick", changes))


def test_it_does_not_say_that_it_takes_a_network_of_your_own() -> None:
    assert not STUDY.takes_your_network
