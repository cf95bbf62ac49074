"""The two networks that [P2] measures on: one that classifies images, and a deep linear one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from batchnorm.records import Run
from batchnorm.report.grid import Grid
from batchnorm.report.spec import Chart
from batchnorm.studies.settings import CellSettings, PositiveRate, SettingsError
from batchnorm.studies.study import TrainingStudySettings, check_data_given, training_cells

__all__ = [
    "LINEAR",
    "TwoNetworks",
    "check_two",
    "deep_linear",
    "network",
    "of_both",
    "two_networks",
]

LINEAR = "linear"


class TwoNetworks(TrainingStudySettings):
    """Settings of a study that has both networks; those without a prefix are the first one's."""

    lr: PositiveRate = 0.1
    """Learning rate of the network."""

    linear_steps: Annotated[int, Field(ge=1)] = 10_000
    """Steps of the deep linear network."""

    linear_lr: PositiveRate = 1e-6
    """Learning rate of the deep linear network."""


def two_networks(
    settings: TwoNetworks, norm: Sequence[str] = ("none", "batch")
) -> list[CellSettings]:
    """The cells of both networks; the deep linear one is [P2]'s in all but its length and rate.

    25 layers of 10×10, 1000 Gaussian samples, full batch, plain gradient descent, Glorot's weights.
    """
    alone = {
        name: TrainingStudySettings.model_fields[name].default
        for name in (
            *("depth", "width", "activation", "placement", "dropout", "lrn", "distortion"),
            *("optimizer", "init_scale", "init_std", "lr_halving", "shuffle"),
        )
    }
    linear: dict[str, Any] = {
        **alone,
        "model": LINEAR,
        "task": "gaussian",
        "scaling": "raw",
        "batch_size": None,
        "weight_decay": 0.0,
        "train_limit": None,
        "landscape_range": None,
        "steps": settings.linear_steps,
        "every": None if settings.every is None else max(1, settings.linear_steps // 100),
    }
    return [
        *training_cells(settings, norm=norm, lr=[settings.lr]),
        *training_cells(settings, norm=norm, lr=[settings.linear_lr], **linear),
    ]


def check_two(settings: TwoNetworks) -> None:
    """See that the first network is not the deep linear one, and has data.

    Raises:
        SettingsError: it is, or has none.
    """
    check_data_given(settings)
    if settings.model == LINEAR:
        raise SettingsError(
            "model='linear': this study has the deep linear network beside yours; its settings are "
            "linear_steps and linear_lr. Choose another model."
        )


def deep_linear(run: Run) -> Run:
    """The part of a run that is of the deep linear network."""
    return _part(run, linear=True)


def network(run: Run) -> Run:
    """The part of a run that is of the other network."""
    return _part(run, linear=False)


def of_both(run: Run, draw: Callable[[Grid], list[Chart]]) -> list[Chart]:
    """The charts that ``draw`` makes of each network: those of the first keep their ids."""
    own = draw(Grid(network(run)))
    return own + [
        replace(chart, id=f"linear-{chart.id}", title=f"{chart.title}, deep linear network")
        for chart in draw(Grid(deep_linear(run)))
    ]


def _part(run: Run, *, linear: bool) -> Run:
    planned = [e for e in run.study["cells"] if (e["model"] == LINEAR) == linear]
    cells = tuple(c for c in run.cells if (c.settings["model"] == LINEAR) == linear)
    return Run(run.folder, run.study | {"cells": planned}, cells)
