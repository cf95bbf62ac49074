"""Settings of a study: one model for the command line, the settings file and the records."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

__all__ = [
    "CellBase",
    "CellSettings",
    "CompareSettings",
    "Scaling",
    "SettingsError",
    "StudySettings",
    "TrainingSettings",
    "distinct",
    "problems",
]


class SettingsError(ValueError):
    """A setting cannot be used; the message names the setting, the value and the way out."""


def problems(
    error: ValidationError, prefix: str = "", settings: type[BaseModel] | None = None
) -> str:
    """What is wrong with which setting, on one line; ``prefix`` goes before each name.

    ``settings`` is the model that was to be made, by default that of ``batchnorm compare``.
    """
    found = []
    for item in error.errors():
        name = prefix + str(item["loc"][0]).replace("_", "-" if prefix else "_")
        known = [*(settings or CompareSettings).model_fields]
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][0]), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            found.append(f"{name} is not a setting.{hint} There is: {', '.join(known)}.")
        else:
            found.append(f"{name}={item['input']!r}: {item['msg'].removeprefix('Value error, ')}.")
    return " ".join(found)


Scaling = Literal["raw", "unit", "binary", "standardize", "skewed"]
Optimizer = Literal["sgd", "momentum", "adam"]
Activation = Literal["sigmoid", "tanh", "relu", "identity"]


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"must be a finite number above 0, not {value}")
    return value


def _not_negative(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"must be a finite number of at least 0, not {value}")
    return value


PositiveRate = Annotated[float, AfterValidator(_positive)]
NonNegativeRate = Annotated[float, AfterValidator(_not_negative)]
Share = Annotated[float, Field(ge=0, lt=1)]


class CellBase(BaseModel):
    """Everything that decides what one cell computes; its hash names the cell's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Annotated[int, Field(ge=0)]

    def document(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return self.model_dump(mode="json")

    @property
    def units(self) -> int:
        """How much there is to do, in units of which the cells of a study cost about the same."""
        return 1

    def axes(self) -> dict[str, Any]:
        """What tells the cell from the others of its study, for its list and for people."""
        return {name: value for name, value in self.document().items() if name != "code"}


class StudySettings(BaseModel):
    """Settings that every study has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: Annotated[int, Field(ge=1)] = 3
    """Number of seeds; verdicts are intervals over them."""


class TrainingSettings(BaseModel):
    """Settings of everything that trains a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = "digits"
    """Data: digits, mnist5k, gaussian, a folder, a hub name, or module:callable."""

    scaling: Scaling = "unit"
    """Input scaling: raw, unit (largest 1), binary, standardize, or skewed (ill-conditioned)."""

    model: str = "mlp"
    """Network: mlp, cnn, vgg, resnet, linear, or module:callable."""

    depth: Annotated[int, Field(ge=1)] | None = None
    """Number of hidden layers (resnet: blocks a stage); each network has its default."""

    width: Annotated[int, Field(ge=1)] | None = None
    """Units of a hidden layer, or channels of the first convolution."""

    activation: Activation | None = None
    """Nonlinearity of the hidden layers."""

    init_scale: PositiveRate = 1.0
    """Factor on the initial weights: 1 is Glorot's, anything else is careless."""

    init_std: PositiveRate | None = None
    """Standard deviation of Gaussian initial weights; by default they are Glorot's."""

    dropout: Share | None = None
    """Dropout rate before the output layer, or (mlp, linear) behind every hidden layer."""

    placement: Literal["before", "after"] | None = None
    """Norms stand before the nonlinearity (the default) or after it, then with a bias before."""

    lrn: bool | None = None
    """Local response normalisation behind the nonlinearity of each convolution."""

    optimizer: Optimizer = "sgd"
    """sgd, momentum (SGD with momentum 0.9) or adam."""

    batch_size: Annotated[int, Field(ge=2)] | None = None
    """Examples a step; 60 as in the paper, the whole training set for gaussian."""

    steps: Annotated[int, Field(ge=1)] = 1000
    """Updates of the weights."""

    lr_halving: PositiveRate | None = None
    """Steps in which the learning rate halves, exponentially; by default it stays."""

    weight_decay: NonNegativeRate = 0.0
    """ℓ2 penalty on all parameters, as torch's optimizers apply it."""

    shuffle: Literal["once"] | None = None
    """once: every epoch has the same batches; by default each is shuffled anew."""

    distortion: Share | None = None
    """Random brightness and contrast of training images, up to this share."""

    train_limit: Annotated[int, Field(ge=2)] | None = None
    """Use only so many training examples (a fixed random choice)."""

    test_limit: Annotated[int, Field(ge=1)] = 1000
    """Evaluate on so many examples of the training set and of the test set."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two measurements; by default each probe has its own number a run."""

    probes: tuple[str, ...] | None = None
    """Which probes run; all by default."""

    landscape_points: Annotated[int, Field(ge=2)] = 6
    """Step sizes tried along the gradient at each measurement of the landscape."""

    landscape_range: tuple[PositiveRate, ...] | None = None
    """Smallest and largest of them as multiples of the learning rate; 0.5,4 (linear: 0.01,30)."""

    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of torch; small networks are fastest with one."""

    @field_validator("landscape_range")
    @classmethod
    def _ordered(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not (len(value) == 2 and value[0] < value[1]):
            raise ValueError(f"must be two rising numbers, not {','.join(map(str, value))}")
        return value


_LATER = ("init_std", "dropout", "lrn", "lr_halving", "shuffle", "distortion", "placement")
"""Settings that came later: left at ``None`` they keep the hash that a cell had without them."""


class CellSettings(TrainingSettings, CellBase):
    """A cell that trains a network."""

    norm: str
    lr: PositiveRate
    code: dict[str, str] = {}
    """Hash of the source file of each module:callable, so that edited code is a new cell."""

    def document(self) -> dict[str, Any]:
        """The settings as JSON values."""
        unset = {name for name in _LATER if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=unset)

    @property
    def units(self) -> int:
        """Steps of the optimizer."""
        return self.steps

    def axes(self) -> dict[str, Any]:
        """Norm, learning rate and seed, and the network, as some studies have two."""
        return {"norm": self.norm, "lr": self.lr, "seed": self.seed, "model": self.model}


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """See that a setting names something, and nothing twice."""
    if not values:
        raise ValueError("must name at least one value")
    if len(set(values)) != len(values):
        raise ValueError(f"names a value twice: {', '.join(map(str, values))}")
    return values


class CompareSettings(TrainingSettings):
    """Settings of ``batchnorm compare``: the shared ones, and three axes."""

    norm: Annotated[tuple[str, ...], AfterValidator(distinct)] = ("none", "batch")
    """Arms: none, batch, layer, group, weight (standardised), ghost2 to ghost32, renorm, frozen,
    l1, l2, linf, noisy, noise."""

    lr: Annotated[tuple[PositiveRate, ...], AfterValidator(distinct)] = (0.1, 1.0, 10.0)
    """Learning rates; each arm is trained with each."""

    seeds: Annotated[int, Field(ge=1)] = 3
    """Number of seeds; arms of the same seed share initial weights and batches."""

    def cells(self, code: dict[str, str]) -> list[CellSettings]:
        """One cell a combination; the arms of a pair stand next to each other."""
        axes = {"norm", "lr", "seeds"}
        shared = self.model_dump(exclude=axes)
        return [
            CellSettings(**shared, norm=norm, lr=lr, seed=seed, code=code)
            for seed in range(self.seeds)
            for lr in self.lr
            for norm in self.norm
        ]
