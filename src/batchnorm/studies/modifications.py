"""The arms of study ``accelerate``: what [P1] Section 4.2.1 changes beside the norm."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from batchnorm.studies.callables import is_callable_name
from batchnorm.studies.settings import CellSettings, PositiveRate, Share
from batchnorm.studies.study import TrainingStudySettings, training_cells

__all__ = ["ARMS", "AccelerateCell", "AccelerateSettings", "arm_cells"]

ARMS = {  # name → (what the legend says, what an axis says)
    "none": ("none", "none"),
    "batch": ("batch", "BN"),
    "x5": ("batch norm, all changes, ×5", "BN ×5"),
    "x30": ("batch norm, all changes, ×30", "BN ×30"),
    "none-x5": ("no normalization, ×5", "none ×5"),
    "x5-sigmoid": ("batch norm, all changes, ×5, sigmoid", "BN ×5 σ"),
    "none-sigmoid": ("no normalization, sigmoid", "none σ"),
    "rate": ("batch norm, ×5", "rate ×5"),
    "decay": ("batch norm, decay 6× faster", "decay"),
    "dropout": ("batch norm, no dropout", "dropout"),
    "lrn": ("batch norm, no response normalization", "LRN"),
    "l2": ("batch norm, ℓ2 ÷ 5", "ℓ2"),
    "shuffle": ("batch norm, each epoch shuffled", "shuffle"),
    "distortion": ("batch norm, half the distortion", "distort"),
}
_CONVOLUTIONAL = ("cnn", "vgg", "resnet")


class AccelerateSettings(TrainingStudySettings):
    """Those of the baseline; what the others change is in docs/studies/accelerate.md."""

    lr: PositiveRate = 0.01
    """Learning rate of the baseline."""

    lr_halving: PositiveRate | None = None
    """Steps in which the baseline's learning rate halves; by default the whole run."""

    dropout: Share | None = 0.4
    """Dropout rate of the baseline, before the output layer (none in a network of your own)."""

    width: Annotated[int, Field(ge=1)] | None = None
    """Channels of the first convolution; by default 8 (cnn) or the network's own."""

    lrn: bool | None = None
    """Local response normalisation in the baseline; by default in built-in convolutional ones."""


class AccelerateCell(CellSettings):
    """One arm, which may differ from the baseline in any setting."""

    arm: str

    def axes(self) -> dict[str, Any]:
        """The arm beside what all training cells have."""
        return {"arm": self.arm} | super().axes()


def _baseline(settings: AccelerateSettings) -> AccelerateSettings:
    """The settings with what is left open in them."""
    own = is_callable_name(settings.model)
    filled: dict[str, Any] = {"lr_halving": settings.lr_halving or float(settings.steps)}
    if own:
        filled |= {"dropout": None, "lrn": None}
    elif settings.lrn is None and settings.model in _CONVOLUTIONAL:
        filled["lrn"] = True
    if settings.width is None and settings.model == "cnn":
        filled["width"] = 8
    return settings.model_copy(update=filled)


def _changes(settings: AccelerateSettings) -> dict[str, dict[str, Any]]:
    """The modifications of [P1] Section 4.2.1, those that find something to change."""
    assert settings.lr_halving is not None
    found: dict[str, dict[str, Any]] = {
        "rate": {"lr": 5 * settings.lr},
        "decay": {"lr_halving": settings.lr_halving / 6},
    }
    if settings.dropout:
        found["dropout"] = {"dropout": None}
    if settings.lrn:
        found["lrn"] = {"lrn": None}
    if settings.weight_decay:
        found["l2"] = {"weight_decay": settings.weight_decay / 5}
    if settings.shuffle:
        found["shuffle"] = {"shuffle": None}
    if settings.distortion:
        found["distortion"] = {"distortion": settings.distortion / 2}
    return found


def _arms(settings: AccelerateSettings) -> dict[str, dict[str, Any]]:
    """What each arm has in place of the baseline's settings."""
    single = _changes(settings)
    every = {name: value for change in single.values() for name, value in change.items()}
    arms: dict[str, dict[str, Any]] = {
        "none": {"norm": "none"},
        "batch": {},
        "x5": every,
        "x30": every | {"lr": 30 * settings.lr},
        "none-x5": {"norm": "none", "lr": 5 * settings.lr},
    }
    if not is_callable_name(settings.model):
        arms["x5-sigmoid"] = every | {"activation": "sigmoid"}
        arms["none-sigmoid"] = {"norm": "none", "activation": "sigmoid"}
    return arms | single


def arm_cells(settings: AccelerateSettings) -> list[AccelerateCell]:
    """The cells of every arm that finds something to change."""
    baseline = _baseline(settings)
    arms = _arms(baseline)
    return [
        AccelerateCell(**one.model_dump() | arms[name], arm=name)
        for one in training_cells(baseline, norm=["batch"], lr=[baseline.lr])
        for name in arms
    ]
