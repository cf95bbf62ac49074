"""[P2] Section 2.1: batch norm whose output is made unstable again by noise."""

from __future__ import annotations

from batchnorm.records import Cell, Run
from batchnorm.report.charts import performance
from batchnorm.report.charts.activations import percentiles
from batchnorm.report.grid import Grid
from batchnorm.report.spec import Chart
from batchnorm.studies.measures import early_mean, instability, last, pairs
from batchnorm.studies.settings import CellSettings, PositiveRate
from batchnorm.studies.study import Study, TrainingStudySettings, check_data_given, training_cells
from batchnorm.verdicts import Above, Below, CannotTellError, Claim

NORMS = ("none", "batch", "noisy", "noise")
_EARLY = 1 / 3
"""Share of the run over which accuracies are averaged: the paper's first 5,000 of 15,000 steps."""


class Settings(TrainingStudySettings):
    """[P2] Section 2.1 and Appendix A.2.1; see docs/studies/noise.md for what they leave open."""

    lr: PositiveRate = 0.1
    """Learning rate of all networks."""


def cells(settings: Settings) -> list[CellSettings]:
    return training_cells(settings, norm=NORMS, lr=[settings.lr])


def _accuracy(cell: Cell) -> float:
    return early_mean(cell, "train/accuracy", _EARLY)


def _gain(run: Run) -> dict[int, float]:
    """Mean accuracy with noisy batch norm minus with none."""
    return {
        seed: _accuracy(noisy) - _accuracy(plain)
        for seed, (plain, noisy) in pairs(run, ("none", "noisy")).items()
    }


def _share(run: Run) -> dict[int, float]:
    """Of batch norm's gain over the plain network, what noisy batch norm has."""
    own, whole = _gain(run), pairs(run)
    found = {}
    for seed in own:
        if seed in whole:
            plain, normed = map(_accuracy, whole[seed])
            if normed <= plain:
                raise CannotTellError(f"Batch norm itself gains nothing for seed {seed}")
            found[seed] = own[seed] / (normed - plain)
    return found


def _unstable(run: Run, than: str) -> dict[int, float]:
    return {
        seed: instability(noisy) / instability(other)
        for seed, (other, noisy) in pairs(run, (than, "noisy")).items()
    }


def _prevented(run: Run) -> dict[int, float]:
    """Final accuracy above guessing, with noise and no batch norm over without either."""
    found = {}
    for seed, (plain, noise) in pairs(run, ("none", "noise")).items():
        guessing = 1 / int(plain.manifest["task"]["outputs"])
        above = last(plain, "train/accuracy") - guessing
        if above <= 0:
            raise CannotTellError(f"The plain network does not learn either for seed {seed}")
        found[seed] = (last(noise, "train/accuracy") - guessing) / above
    return found


def figures(run: Run) -> list[Chart]:
    grid = Grid(run)
    return [performance.accuracy(grid), percentiles(grid)]


STUDY = Study(
    name="noise",
    question="Does batch norm still help where noise behind it makes the distributions unstable?",
    source="[P2] Section 2.1, Appendix A.2.1",
    settings=Settings,
    scales={
        "quick": Settings(
            model="cnn",
            batch_size=60,
            steps=400,
            every=10,
            probes=("performance", "activations"),
            test_limit=300,
        ),
        "full": Settings(
            task="cifar10",
            scaling="standardize",
            model="vgg",
            init_scale=1.4142135623730951,
            batch_size=128,
            steps=15_000,
            every=100,
            probes=("performance", "activations"),
        ),
    },
    cells=cells,
    check=check_data_given,
    figures=figures,
    claims=[
        Claim(
            id="better-than-none",
            sentence="The noisy network learns faster than the one without batch norm",
            source="[P2] Section 2.1",
            reported="75.8% against 52.6% of training accuracy after 1,000 of 15,000 steps, 85.3% "
            "against 72.2% after 2,000, 97.6% against 95.3% after 5,000",
            effect="training accuracy, mean over the first third of the run, noisy minus none",
            measure=_gain,
            rule=Above(0.05, null=0.0),
            figures=("accuracy",),
            percent=True,
        ),
        Claim(
            id="near-batch",
            sentence="It learns nearly as fast as with batch norm and no noise",
            source="[P2] Section 2.1",
            reported="of batch norm's gain over none the noisy network has 77% after 1,000 steps, "
            "79% after 2,000, 68% after 5,000; asked for: half",
            effect="gain of noisy over none as a share of batch norm's gain",
            measure=_share,
            rule=Above(0.5, null=0.0),
            figures=("accuracy",),
            percent=True,
        ),
        Claim(
            id="less-stable-than-batch",
            sentence="Its distributions are less stable than those with batch norm",
            source="[P2] Section 2.1",
            reported="visibly; asked for: twice",
            effect="move of a unit's median between measurements, in widths of its distribution, "
            "noisy over batch norm",
            measure=lambda run: _unstable(run, "batch"),
            rule=Above(2.0, null=1.0),
            ratio=True,
            figures=("percentiles",),
        ),
        Claim(
            id="less-stable-than-none",
            sentence="Its distributions are less stable even than those without batch norm",
            source="[P2] Section 2.1",
            reported="less stable than the standard, non-BatchNorm network",
            effect="as above, noisy over none",
            measure=lambda run: _unstable(run, "none"),
            rule=Above(1.0),
            ratio=True,
            figures=("percentiles",),
        ),
        Claim(
            id="noise-alone",
            sentence="The same noise prevents the network without batch norm from training",
            source="[P2] Section 2.1",
            reported="prevents it from training entirely; asked for: a tenth of what it learns "
            "without the noise",
            effect="final training accuracy above guessing, with the noise over without it",
            measure=_prevented,
            rule=Below(0.1, null=1.0),
            figures=("accuracy",),
            percent=True,
        ),
    ],
)
