"""Cells whose networks differ in depth, and how much of their task each of them learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from batchnorm.records import Cell, Run
from batchnorm.studies.measures import values
from batchnorm.studies.settings import CellSettings, PositiveRate, SettingsError, distinct
from batchnorm.studies.study import TrainingStudySettings, check_data_given, training_cells

__all__ = ["DepthCell", "DepthSettings", "by_depth", "check_depths", "depth_cells", "learned"]


class DepthSettings(TrainingStudySettings):
    """Settings of a study that varies the depth."""

    depths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(distinct)] = (
        *(2, 5, 20, 60),
    )
    """Hidden layers of the networks that are trained."""

    lrs: Annotated[tuple[PositiveRate, ...], AfterValidator(distinct)] = (0.1,)
    """Learning rates; of each depth and norm the one that learns most counts."""


class DepthCell(CellSettings):
    """A cell that trains a network, told from others by its depth too."""

    def axes(self) -> dict[str, Any]:
        """Norm, depth, learning rate and seed."""
        return {
            "norm": self.norm,
            "depth": self.depth,
            "lr": self.lr,
            "seed": self.seed,
            "model": self.model,
        }


def depth_cells(settings: DepthSettings, norm: Sequence[str]) -> list[DepthCell]:
    """One cell for each depth, seed, rate and norm; of ReLUs unless the settings say otherwise."""
    activation: dict[str, Any] = {"activation": settings.activation or "relu"}
    return [
        DepthCell(**cell.model_dump())
        for depth in settings.depths
        for cell in training_cells(settings, norm=norm, lr=settings.lrs, depth=depth, **activation)
    ]


def check_depths(settings: DepthSettings) -> None:
    """See that the depth can be varied, and that there are data.

    Raises:
        SettingsError: it cannot, or there are not.
    """
    from batchnorm.studies.callables import is_callable_name

    check_data_given(settings)
    if settings.depth is not None:
        raise SettingsError(f"depth={settings.depth}: this study varies it. Give depths=… instead.")
    if is_callable_name(settings.model):
        raise SettingsError(
            f"model={settings.model!r}: this study makes networks of several depths, which only "
            "the built-in ones can be. Leave it out; your own data (task=…) can be used."
        )


def learned(cell: Cell) -> float:
    """Of the loss of guessing, what is gone on the training batches of the last fifth.

    Of a network that diverged it is −∞.
    """
    if cell.manifest["state"] == "diverged":
        return -math.inf
    task = cell.manifest["task"]
    losses = values(cell, "batch/loss", after=round(0.8 * int(cell.settings["steps"])))
    examples = task["batch_size"] if task["kind"] == "regression" else 1
    return 1 - float(losses.mean()) / examples / float(task["constant_loss"])


def by_depth(run: Run, norm: str) -> dict[int, dict[int, float]]:
    """What was learned at the best rate, by seed and depth; of seeds all of whose cells ended."""
    planned = {(e["depth"], e["lr"]) for e in run.study["cells"] if "depth" in e}
    arms = {place: run.by_seed(norm=norm, depth=place[0], lr=place[1]) for place in planned}
    seeds = set.intersection(*map(set, arms.values())) if arms else set()
    return {
        seed: {
            depth: max(learned(cells[seed]) for (at, _), cells in arms.items() if at == depth)
            for depth in sorted({depth for depth, _ in planned})
        }
        for seed in sorted(seeds)
    }
