"""[P1] Section 3.2: batch norm before the nonlinearity, or behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from batchnorm.records import Cell, Run
from batchnorm.report.grid import across
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.measures import early_mean, instability, values
from batchnorm.studies.settings import CellSettings, PositiveRate, StudySettings
from batchnorm.studies.study import Study
from batchnorm.verdicts import Above, Claim

Effects = dict[int, float]

NETWORKS = {"mlp": "sigmoid network", "cnn": "ReLU convolutions"}
PLACES = {"before": "batch norm before the nonlinearity", "after": "batch norm behind it"}
LINES = (*PLACES.values(), "input u of the layer", "Wu, before batch norm")
_MEASUREMENTS = 40


class Settings(StudySettings):
    """Two built-in networks; see docs/studies/placement.md."""

    task: str = "digits"
    """Data: digits, mnist5k, a folder of images, a hub name, or module:callable."""

    steps: Annotated[int, Field(ge=_MEASUREMENTS)] = 1000
    """Updates of the fully connected sigmoid network."""

    cnn_steps: Annotated[int, Field(ge=_MEASUREMENTS)] = 300
    """Updates of the convolutional ReLU network."""

    lr: PositiveRate = 0.1
    """Learning rate of both."""

    batch_size: Annotated[int, Field(ge=2)] = 60
    """Examples a step."""

    test_limit: Annotated[int, Field(ge=1)] = 300
    """Evaluate on so many examples of the training set and of the test set."""


def cells(settings: Settings) -> list[CellSettings]:
    steps = {"mlp": settings.steps, "cnn": settings.cnn_steps}
    shared: dict[str, Any] = settings.model_dump(include={"task", "lr", "batch_size", "test_limit"})
    return [
        PlacedCell(
            **shared,
            model=model,
            norm="batch",
            placement=None if place == "before" else "after",
            seed=seed,
            steps=steps[model],
            every=steps[model] // _MEASUREMENTS,
            probes=("performance", "activations"),
        )
        for seed in range(settings.seeds)
        for model in NETWORKS
        for place in PLACES
    ]


class PlacedCell(CellSettings):
    """A network with batch norm in one of two places."""

    def axes(self) -> dict[str, Any]:
        """The usual ones, and the place."""
        return {**super().axes(), "placement": self.placement or "before"}


def run(cell: CellSettings, at: CellRun) -> None:
    from batchnorm.probes.shape import Shape
    from batchnorm.studies.training import train

    every = cell.steps // _MEASUREMENTS
    train(cell, at, extra=lambda cell, layers: [Shape(every)])


def _arm(run: Run, model: str, place: str) -> dict[int, Cell]:
    return run.by_seed(model=model, placement=None if place == "before" else place)


def _hidden(cell: Cell) -> list[str]:
    """Layers whose input is the output of a nonlinearity: not the first, nor the classifier."""
    return cell.layers[1:-1]


def _shape(cell: Cell, quantity: str) -> float:
    """Mean over the run and the hidden layers."""
    return float(np.mean(values(cell, f"shape/{quantity}", _hidden(cell))))


def _less(run: Run, model: str, quantity: str) -> Effects:
    """Of the layers' inputs over that of Wu."""
    return {
        seed: _shape(cell, f"input_{quantity}") / _shape(cell, f"output_{quantity}")
        for seed, cell in _arm(run, model, "before").items()
    }


def _zeros(run: Run, model: str) -> Effects:
    return {
        seed: _shape(cell, "input_zeros") - _shape(cell, "output_zeros")
        for seed, cell in _arm(run, model, "before").items()
    }


def _both(run: Run, model: str) -> dict[int, tuple[Cell, Cell]]:
    before, after = (_arm(run, model, place) for place in PLACES)
    return {seed: (before[seed], after[seed]) for seed in before if seed in after}


def _steadier(run: Run, model: str) -> Effects:
    return {
        s: instability(after) / instability(before)
        for s, (before, after) in _both(run, model).items()
    }


def _gain(run: Run, model: str) -> Effects:
    return {
        seed: early_mean(before, "train/accuracy") - early_mean(after, "train/accuracy")
        for seed, (before, after) in _both(run, model).items()
    }


def _line(index: int, cells: Sequence[Cell], quantity: str, layer: str = "") -> list[Line]:
    series = across([cell.series(quantity, layer) for cell in cells])
    if series is None or not np.isfinite(series.y).any():
        return []
    return [Line(index, series.x, series.y, series.low, series.high)]


def _accuracies(run: Run, model: str) -> list[Panel]:
    panels = []
    for quantity, title in (("train", "training set"), ("test", "test set")):
        lines = [
            line
            for index, place in enumerate(PLACES)
            for line in _line(index, [*_arm(run, model, place).values()], f"{quantity}/accuracy")
        ]
        panels += [Panel(title, lines, domain=(0.0, 1.0))] if lines else []
    return panels


def _shapes(run: Run, model: str) -> list[Panel]:
    cells = [*_arm(run, model, "before").values()]
    panels = []
    for layer in _hidden(cells[0]) if cells else []:
        for quantity, title in (("skewness", "|skewness|"), ("kurtosis", "|excess kurtosis|")):
            lines = [
                line
                for index, side in ((2, "input"), (3, "output"))
                for line in _line(index, cells, f"shape/{side}_{quantity}", layer)
            ]
            panels.append(Panel(f"{layer}: {title}", lines, domain=fit(lines)))
    return panels


def _medians(run: Run, model: str) -> list[Panel]:
    """The percentiles of one unit; of one seed, as those of several have nothing in common."""
    panels = []
    for index, (place, title) in enumerate(PLACES.items()):
        for cell in [*_arm(run, model, place).values()][:1]:
            for layer in _hidden(cell):
                low, middle, high = (
                    cell.series(f"activation/{name}", layer) for name in ("p15", "p50", "p85")
                )
                x, y = np.array([*middle], dtype=float), np.array([*middle.values()])
                below, above = (np.array([*part.values()]) for part in (low, high))
                line = Line(index, x, y, below, above)
                panels.append(Panel(f"{layer}: {title}", [line], domain=fit([line])))
    return panels


def figures(run: Run) -> list[Chart]:
    charts = []
    over_seeds = "smallest to largest over the seeds"
    for model, title in NETWORKS.items():
        accuracies = Chart(
            id="accuracy",
            title="Accuracy",
            how="Higher is better; compare how many steps each line needs to the same height.",
            source=f"{P1}, Section 3.2",
            x=Axis("step"),
            y=Axis("accuracy", percent=True),
            panels=_accuracies(run, model),
            band=over_seeds,
            columns=2,
        )
        shapes = Chart(
            id="shape",
            title="Which is more Gaussian, the input of a layer or what its weights make of it?",
            how="Both are 0 for a Gaussian. Means over the units of a layer, in the network with "
            "batch norm before the nonlinearity; batch norm itself changes neither of them.",
            source=f"{P1}, Section 3.2",
            x=Axis("step"),
            y=Axis("distance from a Gaussian"),
            panels=_shapes(run, model),
            band=over_seeds,
            columns=2,
        )
        medians = Chart(
            id="percentiles",
            title="What the nonlinearity of one unit receives",
            how="Median, and 15th to 85th percentile over the batch, of one seed; where they "
            "wander, the unit has to learn from a moving target.",
            source=f"{P1}, Section 3.2 and Figure 1(b, c)",
            x=Axis("step"),
            y=Axis("input of the unit's nonlinearity"),
            panels=_medians(run, model),
            band="15th to 85th percentile",
            columns=2,
        )
        charts += [
            replace(chart, id=f"{model}-{chart.id}", title=f"{chart.title} ({title})")
            for chart in (accuracies, shapes, medians)
        ]
    return charts


def _claims(model: str) -> list[Claim]:
    network, section = NETWORKS[model], "[P1] Section 3.2"
    claims = [
        Claim(
            id=f"{model}-symmetric",
            sentence=f"Wu has a more symmetric distribution than the layer's input u ({network})",
            source=section,
            reported="more likely to have a symmetric distribution",
            effect="mean |skewness| of the units over the run, u over Wu",
            measure=lambda run: _less(run, model, "skewness"),
            rule=Above(1.0),
            figures=(f"{model}-shape",),
            ratio=True,
        ),
        Claim(
            id=f"{model}-gaussian",
            sentence=f"Wu is more Gaussian than u ({network})",
            source=section,
            reported="more Gaussian",
            effect="mean |excess kurtosis| of the units over the run, u over Wu",
            measure=lambda run: _less(run, model, "kurtosis"),
            rule=Above(1.0),
            figures=(f"{model}-shape",),
            ratio=True,
        ),
        Claim(
            id=f"{model}-steady",
            sentence="Batch norm before the nonlinearity keeps what that receives steadier than "
            f"batch norm behind it ({network})",
            source=section,
            reported="activations with a stable distribution",
            effect="move of a unit's median between measurements, in widths of its distribution, "
            "behind over before",
            measure=lambda run: _steadier(run, model),
            rule=Above(1.0),
            figures=(f"{model}-percentiles",),
            ratio=True,
        ),
        Claim(
            id=f"{model}-accuracy",
            sentence=f"With batch norm before the nonlinearity a network learns faster ({network})",
            source="follows from [P1] Section 3.2, not measured there",
            reported="–; asked for: 1%",
            effect="training accuracy, mean over the run, before minus behind",
            measure=lambda run: _gain(run, model),
            rule=Above(0.01, null=0.0),
            figures=(f"{model}-accuracy",),
            percent=True,
        ),
    ]
    if model == "cnn":  # a sigmoid is never zero
        sparse = Claim(
            id="cnn-sparse",
            sentence=f"Wu is not sparse, and u is ({network})",
            source=section,
            reported="non-sparse; asked for: half of what ReLU does to symmetric inputs",
            effect="share of zeros, u minus Wu",
            measure=lambda run: _zeros(run, model),
            rule=Above(0.25, null=0.0),
            percent=True,
        )
        claims.insert(2, sparse)
    return claims


STUDY = Study(
    name="placement",
    question="Does batch norm belong before the nonlinearity, where the distribution is more "
    "symmetric and more Gaussian, or behind it?",
    source="[P1] Section 3.2",
    settings=Settings,
    scales={
        "quick": Settings(seeds=4),
        "full": Settings(task="mnist5k", steps=50_000, cnn_steps=15_000, test_limit=1000, seeds=10),
    },
    cells=cells,
    run=run,
    figures=figures,
    lines=LINES,
    claims=[claim for model in NETWORKS for claim in _claims(model)],
)
