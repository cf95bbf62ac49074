"""Cells whose batches differ in size: as many examples each, and rates that scale with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from batchnorm.studies.settings import CellSettings, PositiveRate, SettingsError, distinct
from batchnorm.studies.study import TrainingStudySettings, check_data_given, training_cells

__all__ = ["SizedCell", "SizedSettings", "check_sizes", "sized_cells"]


class SizedSettings(TrainingStudySettings):
    """Settings of a study that varies the batch size; ``steps`` and ``lr`` are the largest's."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=2)], ...], AfterValidator(distinct)] = (
        *(2, 4, 8, 16, 32),
    )
    """Batch sizes."""

    lr: PositiveRate = 0.1
    """Learning rate of the largest batch; smaller ones have it in proportion."""


class SizedCell(CellSettings):
    """A cell that trains a network, told from others by its batch size too."""

    def axes(self) -> dict[str, Any]:
        """Norm, batch size, seed, learning rate and dropout."""
        return {
            "norm": self.norm,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "lr": self.lr,
            "model": self.model,
            "dropout": self.dropout or 0.0,
        }


def sized_cells(
    settings: SizedSettings, norm: Sequence[str], size: int, **changes: Any
) -> list[SizedCell]:
    """The cells of one batch size: as many examples as the largest's, and a rate in proportion.

    ``every`` and ``lr_halving`` too count in the largest's steps, so that all measure after as
    many examples. The built-in mlp has ReLUs unless the settings say otherwise.
    """
    share = size / max(settings.sizes)
    changes |= {"batch_size": size, "steps": max(1, round(settings.steps / share))}
    if settings.every is not None:
        changes["every"] = max(1, round(settings.every / share))
    if settings.lr_halving is not None:
        changes["lr_halving"] = settings.lr_halving / share
    if settings.model == "mlp" and settings.activation is None:
        changes["activation"] = "relu"
    cells = training_cells(settings, norm=norm, lr=[settings.lr * share], **changes)
    return [SizedCell(**cell.model_dump()) for cell in cells]


def check_sizes(settings: SizedSettings) -> None:
    """See that there is something to compare, and data.

    Raises:
        SettingsError: there is not.
    """
    check_data_given(settings)
    if settings.batch_size is not None:
        raise SettingsError(
            f"batch_size={settings.batch_size}: this study varies it. Give sizes=… instead."
        )
    if len(settings.sizes) < 2:
        raise SettingsError(f"sizes={settings.sizes[0]}: two sizes or more can be compared.")
