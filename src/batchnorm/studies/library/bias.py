"""[P1] Section 2: a bias before normalisation, and the gradient that ignores the statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from batchnorm.records import Record, Run
from batchnorm.report.grid import across
from batchnorm.report.papers import P1
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.settings import CellBase, PositiveRate, StudySettings
from batchnorm.studies.study import Study
from batchnorm.verdicts import Above, Claim, Within

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 1e-12
"""Relative, float64: a sum over the batch whose terms cancel, each rounded at 1e-16."""

_STANDSTILL = 0.05
"""Growth that counts as none: exactly zero could not be told, an interval having two sides."""

_MEASURED = 50  # points of a curve

# What stands between the linear layer and the nonlinearity, and what its gradient knows of it.
Way = Literal["through", "alone", "ignored", "scaled", "offset"]
LINES: dict[Way, str] = {
    "through": "gradient through the statistics",
    "alone": "statistics ignored, only b learns",
    "ignored": "statistics ignored",
    "scaled": "ignored, mean and variance",
    "offset": "ignored, with β behind",
}


class Settings(StudySettings):
    """A regression on Gaussian data: 64 examples of 10 numbers, 16 tanh units, float64."""

    steps: Annotated[int, Field(ge=_MEASURED)] = 2000
    """Steps of gradient descent."""

    lr: PositiveRate = 0.05
    """Learning rate."""


class BiasCell(CellBase):
    """One way to take the gradient."""

    line: Way
    steps: int
    lr: float

    @property
    def units(self) -> int:
        """Steps of gradient descent."""
        return self.steps


def cells(settings: Settings) -> list[BiasCell]:
    return [
        BiasCell(line=line, seed=seed, steps=settings.steps, lr=settings.lr)
        for seed in range(settings.seeds)
        for line in LINES
    ]


def _start() -> dict[str, Tensor]:
    import torch

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    x = normal(64, 10)
    return {
        "x": x,
        "target": (x @ normal(10, 1)).tanh() + 1,
        "W": normal(16, 10) / 10**0.5,
        "b": torch.zeros(16, dtype=torch.float64),
        "beta": torch.zeros(16, dtype=torch.float64),
        "out": normal(1, 16) / 4,
    }


def _loss(net: dict[str, Tensor], line: str) -> tuple[Tensor, Tensor]:
    """The loss, and the normalised x̂ in it."""
    x = net["x"] @ net["W"].T + net["b"]
    mean = x.mean(0)
    if line != "through":
        mean = mean.detach()
    hat = x - mean
    if line == "scaled":
        hat = hat / x.std(0, correction=0).detach()
    hat.retain_grad()
    z = hat + net["beta"] if line == "offset" else hat
    return (z.tanh() @ net["out"].T - net["target"]).square().mean(), hat


def run(cell: BiasCell, at: CellRun) -> None:
    import torch

    every = cell.steps // _MEASURED
    for step in at.steps(cell.steps):
        if not at.state:
            at.state = _start()
        net = at.state
        leaves = {name: net[name].requires_grad_() for name in ("W", "b", "beta", "out")}
        loss, hat = _loss(net, cell.line)
        loss.backward()
        if step % every == 0 or step == cell.steps - 1:
            gradient, arriving = leaves["b"].grad, hat.grad
            assert gradient is not None
            assert arriving is not None
            moved = {**net, "b": torch.zeros_like(net["b"])}
            values = {
                "bias/norm": net["b"].detach().norm(),
                "bias/gradient": gradient.norm() / arriving.abs().sum(0).norm(),
                "bias/loss": loss.detach(),
                "bias/effect": (_loss(moved, cell.line)[0] - loss).abs().detach(),
            }
            at.write(Record(step, "", name, float(value)) for name, value in values.items())
        with torch.no_grad():
            for name, leaf in leaves.items():
                if leaf.grad is not None and (cell.line != "alone" or name == "b"):
                    leaf -= cell.lr * leaf.grad
                net[name] = leaf.detach()


def _largest(run: Run, quantity: str, line: str) -> dict[int, float]:
    return {
        seed: max(cell.series(quantity).values()) for seed, cell in run.by_seed(line=line).items()
    }


def _growth(run: Run, line: str) -> dict[int, float]:
    """How far b went in the second half of the run, over the first half."""
    found = {}
    for seed, cell in run.by_seed(line=line).items():
        norms = list(cell.series("bias/norm").values())
        half = norms[len(norms) // 2]
        found[seed] = (norms[-1] - half) / half
    return found


def _ratio(run: Run) -> dict[int, float]:
    """‖b‖ at the end with the variance ignored too, over the mean alone."""
    more, less = (_largest(run, "bias/norm", line) for line in ("scaled", "ignored"))
    return {seed: more[seed] / less[seed] for seed in more if seed in less}


def _curves(run: Run, quantity: str) -> list[Line]:
    lines = []
    for index, line in enumerate(LINES):
        series = across([cell.series(quantity) for cell in run.by_seed(line=line).values()])
        if series is not None:
            lines.append(Line(index, series.x, series.y, series.low, series.high))
    return lines


def figures(run: Run) -> list[Chart]:
    band = "smallest to largest over the seeds"
    norm, loss, gradient = (
        _curves(run, quantity) for quantity in ("bias/norm", "bias/loss", "bias/gradient")
    )
    return [
        Chart(
            id="bias-norm",
            title="Size of the bias",
            how="‖b‖ of the bias before the normalisation; what it is makes no difference to the "
            "output, and yet it grows where its gradient ignores the statistics.",
            source=f"{P1}, Section 2",
            x=Axis("step"),
            y=Axis("‖b‖"),
            panels=[Panel("", norm, domain=fit(norm))] if norm else [],
            band=band,
        ),
        Chart(
            id="bias-loss",
            title="Loss",
            how="What all of this does to training.",
            source=f"{P1}, Section 2",
            x=Axis("step"),
            y=Axis("mean squared error", type="log"),
            panels=[Panel("", loss, domain=fit(loss, log=True))] if loss else [],
            band=band,
        ),
        Chart(
            id="bias-gradient",
            title="Gradient of the bias",
            how="Relative to the absolute values that it is the sum of: 1e−16 is rounding.",
            source=f"{P1}, Sections 2 and 3.2",
            x=Axis("step"),
            y=Axis("relative gradient", type="log"),
            panels=[Panel("", gradient, domain=fit(gradient, log=True))] if gradient else [],
            band=band,
        ),
    ]


STUDY = Study(
    name="bias",
    question="Does a bias before normalisation get exactly zero gradient, and does it blow up "
    "where the gradient ignores that the statistics depend on it?",
    source="[P1] Section 2",
    settings=Settings,
    scales={"quick": Settings(), "full": Settings(steps=50_000, seeds=10)},
    cells=cells,
    run=run,
    figures=figures,
    lines=tuple(LINES.values()),
    claims=[
        Claim(
            id="zero-gradient",
            sentence="A bias before normalisation gets zero gradient, so that it can be left out",
            source="[P1] Section 3.2",
            reported="its effect will be cancelled by the subsequent mean subtraction",
            effect="largest gradient of the bias, relative to the terms of its sum",
            measure=lambda run: _largest(run, "bias/gradient", "through"),
            rule=Within(_ROUNDING),
            figures=("bias-gradient",),
        ),
        Claim(
            id="no-effect",
            sentence="Whatever the bias grows to, output and loss stay the same",
            source="[P1] Section 2",
            reported="x + Δb − E[x + Δb] = x − E[x]",
            effect="largest change of the loss by setting the bias to zero",
            measure=lambda run: _largest(run, "bias/effect", "ignored"),
            rule=Within(_ROUNDING),
            figures=("bias-loss",),
        ),
        Claim(
            id="grows",
            sentence="Where the gradient ignores the statistics and nothing else learns, the bias "
            "grows indefinitely",
            source="[P1] Section 2",
            reported="b will grow indefinitely while the loss remains fixed",
            effect="growth of ‖b‖ in the second half of the run over the first; 1 is a straight "
            "line, below 1/20 a standstill; asked for: 1/2",
            measure=lambda run: _growth(run, "alone"),
            rule=Above(0.5, null=_STANDSTILL),
            figures=("bias-norm",),
        ),
        Claim(
            id="grows-in-training",
            sentence="It grows indefinitely in training, where the layers around it learn too",
            source="[P1] Section 2",
            reported="observed empirically: the model blows up",
            effect="growth of ‖b‖ in the second half of the run over the first; asked for: 1/2",
            measure=lambda run: _growth(run, "ignored"),
            rule=Above(0.5, null=_STANDSTILL),
            figures=("bias-norm",),
            full_only="it begins to grow and slows down, so that the length of the run decides",
        ),
        Claim(
            id="scaled",
            sentence="It gets worse where the normalisation also scales the activations",
            source="[P1] Section 2",
            reported="this problem can get worse",
            effect="‖b‖ at the end, mean and variance ignored over the mean alone",
            measure=_ratio,
            rule=Above(1.0),
            ratio=True,
            figures=("bias-norm",),
        ),
        Claim(
            id="offset",
            sentence="It grows indefinitely behind a learned β as well",
            source="[P1] Section 2 together with Algorithm 1",
            reported="not distinguished: the example of Section 2 has no β",
            effect="growth of ‖b‖ in the second half of the run over the first; asked for: 1/2",
            measure=lambda run: _growth(run, "offset"),
            rule=Above(0.5, null=_STANDSTILL),
            figures=("bias-norm",),
        ),
    ],
)
