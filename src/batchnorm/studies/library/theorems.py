"""[P2] Theorems 4.1, 4.2, 4.4 and 4.5, checked in float64 as printed and as corrected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from batchnorm.records import Cell, Record, Run
from batchnorm.report.grid import Vector
from batchnorm.report.papers import P2
from batchnorm.report.spec import Axis, Chart, Line, Panel, fit
from batchnorm.studies.cell_run import CellRun
from batchnorm.studies.settings import CellBase, StudySettings
from batchnorm.studies.study import Study
from batchnorm.verdicts import Claim, Within

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-9
"""Relative, float64: an equality of sums of some hundred products, second derivatives included."""

Network = Literal["random", "trained"]
_NETWORKS: tuple[Network, ...] = ("random", "trained")
_WIDTH, _INPUTS, _CLASSES = 8, 20, 5


class Settings(StudySettings):
    """How much is tried."""

    trials: Annotated[int, Field(ge=1)] = 10
    """Networks drawn, or moments of training, for each seed."""

    batch: Annotated[int, Field(ge=3)] = 64
    """Examples in the batch, m of the theorems."""

    steps: Annotated[int, Field(ge=1)] = 20
    """Steps of training between two moments."""


class TheoremCell(CellBase):
    """One network, random in each trial or trained from one trial to the next."""

    network: Network
    trials: int
    batch: int
    steps: int


def cells(settings: Settings) -> list[TheoremCell]:
    return [
        TheoremCell(network=network, seed=seed, **settings.model_dump(exclude={"seeds"}))
        for seed in range(settings.seeds)
        for network in _NETWORKS
    ]


def _normalized(y: Tensor) -> Tensor:
    """[P1] Algorithm 1 at ε = 0, by its definition: nothing of this package's own layer."""
    centred = y - y.mean(0)
    return centred / centred.square().mean(0).sqrt()


def _draw(batch: int) -> dict[str, Tensor]:
    import torch

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "W": normal(_WIDTH, _INPUTS) / _INPUTS**0.5,
        "gamma": 0.5 + torch.rand(_WIDTH, dtype=torch.float64),
        "beta": normal(_WIDTH),
        "A": normal(_WIDTH, _WIDTH) / _WIDTH**0.5,
        "B": normal(_CLASSES, _WIDTH) / _WIDTH**0.5,
        "x": normal(batch, _INPUTS) + normal(_INPUTS),
        "labels": torch.randint(_CLASSES, (batch,)),
    }


def _after(z: Tensor, net: Mapping[str, Tensor]) -> Tensor:
    """The loss as a function of the layer's output z: the same network with and without BN."""
    from torch.nn import functional as F

    return F.cross_entropy((z @ net["A"].T).tanh() @ net["B"].T, net["labels"])


def _loss(net: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    return _after(net["gamma"] * _normalized(net["x"] @ weight.T) + net["beta"], net)


def measure(net: Mapping[str, Tensor], start: Tensor) -> dict[str, Tensor]:
    """Both sides of every theorem, one value a unit j; ``start`` is W⁰ of Theorem 4.5."""
    import torch

    m, gamma = len(net["x"]), net["gamma"]
    y = (net["x"] @ net["W"].T).detach().requires_grad_()
    sigma = y.detach().std(0, correction=0)
    hat = _normalized(y)
    z = gamma * hat + net["beta"]
    (own,) = torch.autograd.grad(_after(z, net), y, create_graph=True)  # ∇ of the network with BN
    free = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(_after(free, net), free, create_graph=True)  # ∇ without BN
    hat, ratio = hat.detach(), (gamma / sigma).square()
    left = own.detach().square().sum(0)
    size, mean, along = g.square().sum(0), g.sum(0), (g * hat).sum(0)
    corrected = ratio * (size - mean.square() / m - along.square() / m)
    norm = torch.linalg.matrix_norm(net["x"], 2).square()  # λ²

    curved, bound = [], []
    for j in range(_WIDTH):
        direction = torch.zeros_like(y)
        direction[:, j] = own.detach()[:, j]
        (turned,) = torch.autograd.grad(own, y, direction, retain_graph=True)
        curved.append((turned * direction).sum())
        (turned,) = torch.autograd.grad(g, free, direction, retain_graph=True)
        bound.append(ratio[j] * (turned * direction).sum())
    shrink = gamma / (m * sigma.square()) * along * left

    # Theorem 4.4 is of the worst input of spectral norm λ: the one along the gradient.
    worst = norm * left
    inner, squares = (start * net["W"]).sum(1), net["W"].square().sum(1)
    optimum = (inner / squares)[:, None] * net["W"]
    gap = squares - inner
    return {
        "4.1/measured": left,
        "4.1/printed": ratio * (size - mean.square() / m - along.square() / m**0.5),
        "4.1/corrected": corrected,
        "4.1/scale": ratio * size,
        "4.2/measured": torch.stack(curved),
        "4.2/printed": torch.stack(bound) - shrink,
        "4.2/scale": torch.stack(bound).abs() + shrink.abs(),
        "4.4/measured": worst,
        "4.4/printed": ratio * ((norm * size) ** 2 - mean.square() / m - norm * along.square()),
        "4.4/corrected": norm * corrected,
        "4.4/scale": norm * ratio * size,
        "4.5/measured": (start - optimum).square().sum(1),
        "4.5/printed": (start - net["W"]).square().sum(1) - gap.square() / squares,
        "4.5/scale": start.square().sum(1) + squares,
        "4.5/applies": (inner > 0).double(),
        # Ŵ* = kW* is as good an optimum as W* only where k > 0.
        "4.5/loss": torch.stack(
            [_loss(net, _with_row(net["W"], optimum, j)) for j in range(_WIDTH)]
        )
        - _loss(net, net["W"]),
    }


def _with_row(weight: Tensor, other: Tensor, row: int) -> Tensor:
    changed = weight.clone()
    changed[row] = other[row]
    return changed


_TRAINED = ("W", "gamma", "beta", "A", "B")


def _train(net: dict[str, Tensor], steps: int) -> None:
    """Plain gradient descent on the batch."""
    import torch

    for _ in range(steps):
        leaves = {name: net[name].requires_grad_() for name in _TRAINED}
        loss = _loss(leaves | {"x": net["x"], "labels": net["labels"]}, leaves["W"])
        found = torch.autograd.grad(loss, list(leaves.values()))
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            net[name] = (leaf - 0.5 * gradient).detach()


def run(cell: TheoremCell, at: CellRun) -> None:
    for trial in at.steps(cell.trials):
        if cell.network == "random" or not at.state:
            at.state = _draw(cell.batch)
            at.state["start"] = _draw(cell.batch)["W"]
            if cell.network == "trained":
                at.state["start"] = at.state["W"].clone()
        if cell.network == "trained":
            _train(at.state, cell.steps)
        for quantity, values in measure(at.state, at.state["start"]).items():
            at.write(Record(trial, "", quantity, v, j) for j, v in enumerate(values.tolist()))


def _table(cell: Cell, quantity: str) -> Vector:
    """Values by trial and unit."""
    return np.array(
        [list(cell.series(quantity, index=j).values()) for j in range(_WIDTH)], dtype=float
    ).T


def _over_networks(run: Run, of: Callable[[Cell], float]) -> dict[int, float]:
    """The largest value that ``of`` takes from a cell, over both networks."""
    found: dict[int, float] = {}
    for network in _NETWORKS:
        for seed, cell in run.by_seed(network=network).items():
            found[seed] = max(found.get(seed, 0.0), of(cell))
    return found


def _violated(theorem: str, run: Run) -> dict[int, float]:
    """Share of units whose measured side is above the printed bound, beyond rounding."""

    def share(cell: Cell) -> float:
        margin = EXACT * _table(cell, f"{theorem}/scale")
        above = _table(cell, f"{theorem}/measured") > _table(cell, f"{theorem}/printed") + margin
        return float(above.mean())

    return _over_networks(run, share)


def _gap(theorem: str, side: str, run: Run) -> dict[int, float]:
    """Largest relative difference between the two sides."""

    def largest(cell: Cell) -> float:
        difference = _table(cell, f"{theorem}/measured") - _table(cell, f"{theorem}/{side}")
        return float(np.abs(difference / _table(cell, f"{theorem}/scale")).max())

    return _over_networks(run, largest)


def _same_loss(run: Run) -> dict[int, float]:
    """Largest change of the loss from W* to Ŵ*, where the theorem applies."""

    def largest(cell: Cell) -> float:
        where = _table(cell, "4.5/applies") == 1
        return float(np.abs(_table(cell, "4.5/loss")[where]).max(initial=0.0))

    return _over_networks(run, largest)


def _bound_chart(run: Run, theorem: str, sides: Iterable[str], title: str, how: str) -> Chart:
    """Both sides of a theorem in units of its first term, one panel a network, first seed."""
    panels = []
    for network in _NETWORKS:
        for cell in list(run.by_seed(network=network).values())[:1]:
            scale = _table(cell, f"{theorem}/scale")
            trials = np.arange(len(scale), dtype=float)
            lines = [
                Line(("measured", "printed", "corrected").index(side), trials, values.mean(1))
                for side in sides
                for values in [_table(cell, f"{theorem}/{side}") / scale]
            ]
            panels.append(Panel(f"{network} networks", lines, domain=fit(lines)))
    return Chart(
        id=f"theorem-{theorem.replace('.', '-')}",
        title=title,
        how=how,
        source=f"{P2}, Theorem {theorem}",
        x=Axis("trial"),
        y=Axis("share of the size of the bound"),
        panels=panels,
        columns=2,
        dots=True,
    )


def figures(run: Run) -> list[Chart]:
    return [
        _bound_chart(
            run,
            "4.1",
            ("measured", "printed", "corrected"),
            "Theorem 4.1: the gradient and its bound",
            "Means over the units, as shares of γ²/σ²·‖∇L‖²; a bound below what was measured is "
            "violated, and the corrected one lies on it.",
        ),
        _bound_chart(
            run,
            "4.2",
            ("measured", "printed"),
            "Theorem 4.2: the curvature along the gradient and its bound",
            "Means over the units, as shares of the sizes of the bound's terms; bound and "
            "measurement lie on each other.",
        ),
        _bound_chart(
            run,
            "4.4",
            ("measured", "printed", "corrected"),
            "Theorem 4.4: the gradient of the weights for the worst input, and its bound",
            "Means over the units, as shares of λ²γ²/σ²·‖∇L‖²; a bound below what was measured is "
            "violated, and the corrected one lies on it.",
        ),
    ]


def _equality(theorem: str, side: str, sentence: str, reported: str) -> Claim:
    return Claim(
        id=f"{theorem}-{side}",
        sentence=sentence,
        source=f"[P2] Theorem {theorem}",
        reported=reported,
        effect="largest difference of the two sides, relative to the bound's terms",
        measure=lambda run: _gap(theorem, side, run),
        rule=Within(EXACT),
        figures=(f"theorem-{theorem.replace('.', '-')}",) if theorem != "4.5" else (),
    )


def _printed(theorem: str, note: str) -> Claim:
    return Claim(
        id=f"{theorem}-printed",
        sentence=f"Theorem {theorem} bounds the gradient as it is printed",
        source=f"[P2] Theorem {theorem}",
        reported="a proof",
        effect="share of units whose gradient is above the bound",
        measure=lambda run: _violated(theorem, run),
        rule=Within(0.0),
        figures=(f"theorem-{theorem.replace('.', '-')}",),
        note=note,
        percent=True,
    )


STUDY = Study(
    name="theorems",
    question="Do the theorems on the smoothness of the loss hold in float64, as printed and as "
    "corrected?",
    source="[P2] Section 4",
    settings=Settings,
    scales={"quick": Settings(), "full": Settings(trials=100, steps=50, seeds=10)},
    cells=cells,
    run=run,
    figures=figures,
    lines=("measured", "as printed", "as corrected"),
    claims=[
        _printed("4.1", "The printed factor 1/√m of the last term has to be 1/m."),
        _equality(
            "4.1",
            "corrected",
            "With 1/m in place of 1/√m, Theorem 4.1 holds and is an equality",
            "printed with 1/√m",
        ),
        _equality("4.2", "printed", "Theorem 4.2 holds, as an equality", "an inequality"),
        _printed("4.4", "The printed bound squares a squared norm and misses λ² and 1/m."),
        _equality(
            "4.4",
            "corrected",
            "With λ²(‖∇L‖² − ⟨1,∇L⟩²/m − ⟨∇L,ŷ⟩²/m), Theorem 4.4 holds and the worst input "
            "reaches it",
            "printed with g_j² − mμ² − λ²⟨∇L,ŷ⟩²",
        ),
        _equality("4.5", "printed", "Theorem 4.5 holds, as an equality", "an inequality"),
        Claim(
            id="4.5-optimum",
            sentence="Ŵ* = kW* of Theorem 4.5 is an optimum of the network with batch norm "
            "wherever W* is and ⟨W⁰,W*⟩ > 0",
            source="[P2] Theorem 4.5",
            reported="from the invariance to the scale of the weights",
            effect="largest change of the loss from W* to Ŵ*",
            measure=_same_loss,
            rule=Within(EXACT),
        ),
    ],
)
