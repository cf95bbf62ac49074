"""What a factor on the weights in front of batch norm changes, calculated in float64.

The normalisation is this package's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from batchnorm.records import Record
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.settings import CellBase

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FACTORS",
    "IDENTITIES",
    "MEASURED",
    "WAYS",
    "IdentityCell",
    "TrainingCell",
    "Way",
    "run",
    "scaled",
]

FACTORS = tuple(10 ** (exponent / 4) for exponent in range(-12, 13))
IDENTITIES = ("output", "input gradient", "weight gradient")
MEASURED = 100  # points of a curve

# How the weights start and whether they decay.
Way = Literal["free", "free-large", "decay", "decay-large"]
WAYS: dict[Way, str] = {
    "free": "no weight decay",
    "free-large": "no weight decay, initial weights × 10",
    "decay": "weight decay",
    "decay-large": "weight decay, initial weights × 10",
}

_EPSILON = 1e-5
_UNITS, _INPUTS, _CLASSES, _EXAMPLES, _BATCH = 16, 20, 5, 512, 32


class IdentityCell(CellBase):
    """The identities on one layer and batch, for weights × a."""

    line: Literal["identities"] = "identities"


class TrainingCell(CellBase):
    """One way to start and to decay."""

    line: Way
    steps: int
    lr: float
    weight_decay: float

    @property
    def units(self) -> int:
        """Steps of SGD."""
        return self.steps


def run(cell: CellBase, at: CellRun) -> None:
    """Compute one cell."""
    if isinstance(cell, IdentityCell):
        _identities(at)
    elif isinstance(cell, TrainingCell):
        _train(cell, at)


def _normal(*shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, dtype=torch.float64)


def scaled(
    u: Tensor, weight: Tensor, towards: Tensor, factor: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BN((aW)u), and the gradients of ⟨BN((aW)u), towards⟩ by u and by aW."""
    import torch

    from batchnorm.functional import batch_norm

    inputs, weights = u.clone().requires_grad_(), (factor * weight).requires_grad_()
    y = batch_norm(inputs @ weights.T, eps=eps).y
    by_input, by_weight = torch.autograd.grad(y, (inputs, weights), towards)
    return y.detach(), by_input, by_weight


def _identities(at: CellRun) -> None:
    def off(found: Tensor, wanted: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    for trial in at.steps(len(FACTORS)):
        if not at.state:
            u = _normal(_EXAMPLES, _INPUTS) + 3 * _normal(_INPUTS)
            weight, towards = _normal(_UNITS, _INPUTS), _normal(_EXAMPLES, _UNITS)
            at.state = {"u": u, "weight": weight, "towards": towards}
        u, weight, towards = (at.state[name] for name in ("u", "weight", "towards"))
        a = FACTORS[trial]
        y, by_input, by_weight = scaled(u, weight, towards, 1.0, 0.0)
        other, other_input, other_weight = scaled(u, weight, towards, a, 0.0)
        with_eps = scaled(u, weight, towards, a, _EPSILON)[0]
        variance = (u @ weight.T).var(0, correction=0)
        shrunk = y / (1 + _EPSILON / (a * a * variance)).sqrt()
        at.write(
            Record(trial, "", f"identity/{name}", value)
            for name, value in (
                ("output", off(other, y)),
                ("input gradient", off(other_input, by_input)),
                ("weight gradient", off(a * other_weight, by_weight)),
                ("output with epsilon", off(with_eps, y)),
                ("closed form", off(with_eps, shrunk)),
            )
        )


def _start(way: Way) -> dict[str, Tensor]:
    import torch

    x = _normal(_EXAMPLES, _INPUTS)
    labels = (x @ _normal(_INPUTS, _CLASSES)).argmax(1)
    # One label in five is wrong, so that the gradients never die out.
    wrong = torch.rand(_EXAMPLES) < 0.2
    labels[wrong] = torch.randint(_CLASSES, (int(wrong.sum()),))
    # Small, so that the weights outgrow where they started within the run.
    weight = _normal(_UNITS, _INPUTS) / (10 * _INPUTS**0.5)
    return {
        "x": x,
        "labels": labels,
        "weight": 10 * weight if way.endswith("large") else weight,
        "out": _normal(_CLASSES, _UNITS) / _UNITS**0.5,
        "angles": torch.zeros((), dtype=torch.float64),
        "deviation": torch.zeros((), dtype=torch.float64),
    }


def _train(cell: TrainingCell, at: CellRun) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    from batchnorm.functional import batch_norm

    every = cell.steps // MEASURED
    for step in at.steps(cell.steps):
        if not at.state:
            at.state = _start(cell.line)
        net = at.state
        chosen = torch.randint(_EXAMPLES, (_BATCH,))
        weight, out = net["weight"].requires_grad_(), net["out"].requires_grad_()
        hidden = batch_norm(net["x"][chosen] @ weight.T, eps=0.0).y.tanh()
        loss = cross_entropy(hidden @ out.T, net["labels"][chosen])
        g, g_out = torch.autograd.grad(loss, (weight, out))
        weight, out = weight.detach(), out.detach()
        moved = weight - cell.lr * (g + cell.weight_decay * weight)
        sizes, turned = weight.square().sum(1), moved.square().sum(1)
        cosine = (weight * moved).sum(1) / (sizes * turned).sqrt()
        net["angles"] += cosine.clamp(max=1).acos().square().mean()
        if not cell.weight_decay:
            # Only without decay is the update the gradient alone, at right angles to the weights.
            expected = sizes + cell.lr**2 * g.square().sum(1)
            net["deviation"] = torch.maximum(net["deviation"], (turned / expected - 1).abs().max())
        if (step + 1) % every == 0:
            at.write(
                Record(step + 1, "", f"scale/{name}", float(value))
                for name, value in (
                    ("loss", loss.detach()),
                    ("norm", turned.mean().sqrt()),
                    ("effective_lr", cell.lr / turned.mean()),
                    ("angle", (net["angles"] / every).sqrt()),
                    ("deviation", net["deviation"]),
                )
            )
            net["angles"] = torch.zeros((), dtype=torch.float64)
        net["weight"], net["out"] = moved, out - cell.lr * g_out
