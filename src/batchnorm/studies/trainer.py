"""Trains one cell: steps, probes, records, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from batchnorm.probes import BatchLoss, Layer, Probe, Step, find_layers, observe
from batchnorm.probes.activations import UNIT
from batchnorm.records import RECORDS, RecordWriter
from batchnorm.studies.batches import Batches
from batchnorm.studies.cell_run import write_manifest
from batchnorm.studies.checkpoint import (
    CHECKPOINT,
    damaged,
    load_checkpoint,
    save_checkpoint,
)
from batchnorm.studies.distortion import make_distortion
from batchnorm.studies.instruments import make_probes
from batchnorm.studies.models import Arm
from batchnorm.studies.settings import CellSettings
from batchnorm.studies.tasks import Task
from batchnorm.transforms.dataflow import preserved

__all__ = ["Extra", "Trainer"]

Extra = Callable[[CellSettings, list[Layer]], list[Probe]]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, **rest: torch.optim.SGD(parameters, momentum=0.9, **rest),
    "adam": torch.optim.Adam,
}


class Trainer:
    """One cell from its first step, or its last checkpoint, to its end.

    A step that probes want to see and one that they do not take the same path through the
    training: probes only read.
    """

    def __init__(
        self,
        settings: CellSettings,
        task: Task,
        arm: Arm,
        folder: Path,
        *,
        checkpoint_seconds: float = 15.0,
        extra: Extra | None = None,
    ) -> None:
        """Prepare the cell, from the checkpoint in ``folder`` if there is one.

        ``extra`` makes probes beside those that the settings name.
        """
        self.settings, self.task, self.arm, self.folder = settings, task, arm, folder
        self.checkpoint_seconds = checkpoint_seconds
        self.model = arm.model
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = _OPTIMIZERS[settings.optimizer](
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.batch_size = settings.batch_size or len(task.train)
        once = settings.shuffle == "once"
        self.batches = Batches(len(task.train), self.batch_size, settings.seed, once=once)
        self.distortion = make_distortion(settings, task)
        self.layers = find_layers(self.model, task.train.x[:2])
        self.probes = make_probes(settings, task, self.layers)
        self.probes += extra(settings, self.layers) if extra else []
        self.step = 0
        self.seconds = dict.fromkeys(("train", *(probe.name for probe in self.probes)), 0.0)
        torch.manual_seed(settings.seed)  # dropout, the same for every arm
        folder.mkdir(parents=True, exist_ok=True)
        self.records = RecordWriter(folder / RECORDS, keep=self._resume())
        self.model.train()

    def _resume(self) -> int:
        """Load the checkpoint, if any; return how much of the records it stands for."""
        state = load_checkpoint(self.folder)
        if state is None:
            return 0
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            self.step, self.seconds = state["step"], state["seconds"]
            for probe in self.probes:
                if probe.name in state["probes"]:
                    probe.load_state_dict(state["probes"][probe.name])
        except Exception as error:
            raise damaged(self.folder, error) from error
        length: int = state["records"]
        return length

    def _checkpoint(self) -> None:
        save_checkpoint(
            self.folder,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "step": self.step,
                "seconds": self.seconds,
                "probes": {p.name: kept for p in self.probes if (kept := p.state_dict())},
                "records": self.records.sync(),
            },
        )

    def _write_manifest(self, state: str) -> None:
        write_manifest(
            self.folder,
            self.settings,
            state,
            self.step,
            self.seconds,
            layers=[layer.name for layer in self.layers],
            unit=UNIT,
            parameters=sum(p.numel() for p in self.parameters.values()),
            changes=self.arm.changes,
            task={
                "name": self.task.name,
                "kind": self.task.kind,
                "train": len(self.task.train),
                "test": len(self.task.test),
                "shape": list(self.task.shape),
                "outputs": self.task.outputs,
                "batch_size": self.batch_size,
                "constant_loss": self.task.constant_loss(),
                "note": self.task.note,
            },
        )

    def run(
        self,
        *,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda step: None,
    ) -> str:
        """Train to the end, to divergence, or until ``stop`` says so.

        Args:
            stop: asked after every step; a checkpoint is written before leaving.
            progress: told the number of steps done.

        Returns:
            ``done``, ``diverged`` or ``interrupted``, as in the manifest.
        """
        with self.records:
            self._write_manifest("running")
            saved = time.monotonic()
            state = "done"
            while True:
                last = self.step == self.settings.steps
                if not self._step(last):
                    state = "diverged"
                    break
                if last:
                    break
                self.step += 1
                progress(self.step)
                if stop():
                    state = "interrupted"
                    break
                if time.monotonic() - saved >= self.checkpoint_seconds:
                    self._checkpoint()
                    saved = time.monotonic()
            if state == "interrupted":
                self._checkpoint()
            else:
                self.records.sync()
        self._write_manifest(state)
        if state != "interrupted":
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return state

    def _lr(self) -> float:
        """The learning rate of this step."""
        halving = self.settings.lr_halving
        return self.settings.lr * (1.0 if halving is None else 0.5 ** (self.step / halving))

    def _step(self, last: bool) -> bool:
        """One update; the last step is measured only. False: the loss is not finite."""
        due = [p for p in self.probes if last or self.step % p.every == 0]
        started = time.perf_counter()
        chosen, lr = self.batches[self.step], self._lr()
        x = self.task.train.x[chosen]
        step = Step(
            number=self.step,
            model=self.model,
            layers=self.layers,
            x=x if self.distortion is None else self.distortion(self.step, x),
            y=self.task.train.y[chosen],
            loss_function=self.task.loss,
            lr=lr,
            random_state=torch.get_rng_state(),
        )
        if due:
            step.buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        watched = [m for probe in due for m in probe.modules(self.model, self.layers)]
        self.optimizer.zero_grad()
        # After the last update nothing may move any more, running statistics included.
        with preserved(self.model) if last else nullcontext():
            with observe(watched) as step.seen:
                output = self.model(step.x)
            loss = self.task.loss(output, step.y)
            step.loss = float(loss.detach())
            loss.backward()
            self._count("train", started)
            self._before_update(due, step)
        if not math.isfinite(step.loss):
            return False
        if not last:
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._count("train", started)
            self._after_update(due, step)
        return True

    def _before_update(self, due: list[Probe], step: Step) -> None:
        if due:
            step.parameters = {n: p.detach().clone() for n, p in self.parameters.items()}
            step.gradients = {
                n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None
            }
            # A layer that took no part in this step has nothing to measure.
            step.layers = [layer for layer in self.layers if layer.weight in step.gradients]
        for probe in due:
            # Where the loss overflowed, the loss is all there is to say.
            if math.isfinite(step.loss) or isinstance(probe, BatchLoss):
                started = time.perf_counter()
                self.records.write(probe.before_update(step))
                self._count(probe.name, started)

    def _after_update(self, due: list[Probe], step: Step) -> None:
        if due:
            step.updated = {name: p.detach() for name, p in self.parameters.items()}
        for probe in due:
            started = time.perf_counter()
            self.records.write(probe.after_update(step))
            self._count(probe.name, started)

    def _count(self, what: str, started: float) -> None:
        self.seconds[what] += time.perf_counter() - started
