"""Which probes a cell carries, and how often they measure."""

from __future__ import annotations

import math
from collections.abc import Callable

from batchnorm.probes import (
    Activations,
    BatchLoss,
    Gradients,
    Landscape,
    Layer,
    Performance,
    Probe,
    Running,
    Shift,
    Weights,
)
from batchnorm.studies.settings import CellSettings, SettingsError
from batchnorm.studies.tasks import Task
from batchnorm.studies.unknown import unknown

__all__ = ["PROBES", "make_probes"]


def _performance(settings: CellSettings, task: Task) -> Probe:
    train = task.train.subset(settings.test_limit, seed=1)
    test = task.test.subset(settings.test_limit, seed=1)
    return Performance({"train": (train.x, train.y), "test": (test.x, test.y)}, task.loss)


def _landscape(settings: CellSettings, task: Task) -> Probe:
    # [P2] tries other step sizes on the deep linear network than on the VGG.
    own = (0.01, 30.0) if settings.model == "linear" else (0.5, 4.0)
    low, high = settings.landscape_range or own
    return Landscape(settings.landscape_points, low, high)


PROBES: dict[str, Callable[[CellSettings, Task], Probe]] = {
    "loss": lambda settings, task: BatchLoss(),
    "performance": _performance,
    "activations": lambda settings, task: Activations(),
    "gradients": lambda settings, task: Gradients(),
    "weights": lambda settings, task: Weights(),
    "running": lambda settings, task: Running(),
    "shift": lambda settings, task: Shift(),
    "landscape": _landscape,
}
"""Name → factory. Studies add theirs."""


_SHARE = 0.25
"""A probe's default cadence lets it cost at most this share of the training."""


def make_probes(settings: CellSettings, task: Task, layers: list[Layer]) -> list[Probe]:
    """The probes that a cell's settings ask for, each with its cadence.

    By default a probe measures as often as it wants to in a run, or less often where one
    measurement costs many training steps, as on deep networks and in short runs.

    Raises:
        SettingsError: an unknown probe is asked for.
    """
    names = list(PROBES) if settings.probes is None else list(settings.probes)
    made = []
    for name in names:
        if name not in PROBES:
            raise SettingsError(unknown("probes", name, PROBES))
        probe = PROBES[name](settings, task)
        cost = probe.cost(layers, settings.batch_size or len(task.train))
        wanted = max(1, settings.steps // probe.samples, math.ceil(cost / _SHARE))
        probe.every = settings.every or wanted
        made.append(probe)
    return made
