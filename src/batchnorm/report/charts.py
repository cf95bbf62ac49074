"""All charts of the report, built once from a run and drawn elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from batchnorm.report import findings
from batchnorm.report.grid import Arm, Grid, Series, measured_layers
from batchnorm.report.headline import Summary
from batchnorm.report.spec import Axis, Chart, End, Line, Panel, Rule, fit
from batchnorm.report.words import count, number

__all__ = ["build"]

P1 = "[P1] Ioffe & Szegedy 2015"
P2 = "[P2] Santurkar et al. 2018"

_SEEDS = "smallest to largest over the seeds"
_BINS = 32

Find = Callable[[Grid, float], str]


def build(grid: Grid, summary: Summary) -> list[Chart]:
    """Every chart for which something was measured."""
    made = [
        _loss(grid),
        _accuracy(grid),
        _against_rate(grid, summary),
        _percentiles(grid),
        _moments(grid),
        _histograms(grid),
        _depth(grid),
        _shift_distance(grid),
        _shift_cosine(grid),
        _loss_variation(grid),
        _predictiveness(grid),
        _smoothness(grid),
        _running_mean(grid),
        _running_variance(grid),
        _weight_norm(grid),
        _effective_rate(grid),
    ]
    return [chart for chart in made if chart.panels]


def _steps(grid: Grid) -> Axis:
    return Axis("step", domain=(0.0, float(max(grid.steps, 1))))


def _line(grid: Grid, arm: Arm, rate: float, series: Series | None, several: bool) -> Line | None:
    """The mean over seeds, with their range, and a mark where a seed diverged."""
    if series is None:
        return None
    ends = []
    for cell in grid.at(arm, rate):
        if cell.manifest["state"] == "diverged":
            at = float(cell.manifest["step"])
            before = series.y[(series.x <= at) & np.isfinite(series.y)]
            if len(before):
                ends.append(End(at, float(before[-1])))
    low, high = (series.low, series.high) if several else (None, None)
    return Line(grid.arms.index(arm), series.x, series.y, low, high, ends)


def _seed_lines(grid: Grid, rate: float, quantity: str, layer: str = "") -> list[Line]:
    several = len(grid.seeds) > 1
    lines = (
        _line(grid, arm, rate, grid.series(arm, rate, quantity, layer), several)
        for arm in grid.arms
    )
    return [line for line in lines if line]


def _band_line(
    grid: Grid, arm: Arm, rate: float, low: str, high: str, middle: str = "", layer: str = ""
) -> Line | None:
    """From one quantity to another, with a third between them where one is named."""
    edges = [grid.series(arm, rate, quantity, layer) for quantity in (low, high)]
    if edges[0] is None or edges[1] is None:
        return None
    center = grid.series(arm, rate, middle, layer) if middle else edges[1]
    line = _line(grid, arm, rate, center, several=False)
    if line is None:
        return None
    return Line(
        line.arm, line.x, line.y if middle else None, edges[0].y, edges[1].y, ends=line.ends
    )


def _found(grid: Grid, find: Find) -> dict[str, str]:
    said = {str(i): find(grid, rate) for i, rate in enumerate(grid.rates)}
    return {key: sentence for key, sentence in said.items() if sentence}


def _overview(layers: Sequence[str], shown: Sequence[str], most: int = 3) -> list[str] | None:
    """The last of ``shown``, or last, middle and first; ``None`` where that is all there is."""
    if most == 1:
        shown = shown[-1:]
    elif len(shown) > 3:
        shown = [shown[-1], shown[len(shown) // 2], shown[0]]
    else:
        shown = list(reversed(shown))
    return None if len(shown) == len(layers) else list(shown)


def _hidden(layers: list[str]) -> list[str]:
    """All but the output layer, unless that is the only one."""
    return layers[:-1] or layers


def _per_rate(grid: Grid, make: Callable[[int, float], Iterable[Panel]]) -> list[Panel]:
    panels = [panel for i, rate in enumerate(grid.rates) for panel in make(i, rate)]
    return [panel for panel in panels if panel.lines]


def _layered(
    grid: Grid,
    quantity: str,
    *,
    id: str,
    title: str,
    how: str,
    source: str,
    y: Axis,
    find: Find,
    skip_first: bool = False,
    domain: tuple[float, float] | None = None,
) -> Chart:
    """One quantity over the steps, one panel a layer, one line an arm."""
    layers = measured_layers(grid, quantity)
    shown = layers[1:] if skip_first and len(layers) > 1 else layers
    overview = _overview(layers, shown)

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            lines = _seed_lines(grid, rate, quantity, layer)
            covers = domain or fit(lines, log=y.type == "log")
            yield Panel(f"layer {layer}", lines, rate=i, layer=layer, domain=covers)

    return Chart(
        id=id,
        title=title,
        how=how,
        source=source,
        x=_steps(grid),
        y=y,
        panels=_per_rate(grid, panels),
        band=_SEEDS if len(grid.seeds) > 1 else "",
        columns=min(3, len(overview or layers)),
        overview=overview,
        findings=_found(grid, find),
    )


def _guessing(grid: Grid) -> list[Rule]:
    return [Rule(grid.guessing, "guessing")] if grid.guessing is not None else []


def _loss(grid: Grid) -> Chart:
    places = {
        "batch/loss": "training batches",
        "train/loss": "training set",
        "test/loss": "test set",
    }

    def panels(i: int, rate: float) -> Iterable[Panel]:
        drawn = {name: _seed_lines(grid, rate, quantity) for quantity, name in places.items()}
        covers = fit([line for lines in drawn.values() for line in lines], log=True)
        for name, lines in drawn.items():
            yield Panel(name, lines, rate=i, domain=covers)

    def find(grid: Grid, rate: float) -> str:
        said = findings.course(grid, rate, "train/loss", "The loss on the training set")
        return f"{said} {findings.diverged(grid, rate)}".strip()

    return Chart(
        id="loss",
        title="Loss",
        how="Lower is better, and a line that falls sooner learns in fewer steps. On training "
        "batches the network runs in training mode, on the two sets in evaluation mode.",
        source="the quantity that [P1] and [P2] minimise",
        x=_steps(grid),
        y=Axis("loss", type="log"),
        panels=_per_rate(grid, panels),
        band=_SEEDS if len(grid.seeds) > 1 else "",
        columns=3,
        findings=_found(grid, find),
    )


def _accuracy(grid: Grid) -> Chart:
    places = {"train/accuracy": "training set", "test/accuracy": "test set"}

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for quantity, name in places.items():
            yield Panel(
                name,
                _seed_lines(grid, rate, quantity),
                rate=i,
                domain=(0.0, 1.0),
                rules=_guessing(grid),
            )

    def find(grid: Grid, rate: float) -> str:
        return findings.course(grid, rate, "test/accuracy", "Test accuracy", share=True)

    return Chart(
        id="accuracy",
        title="Accuracy",
        how="Higher is better; compare how many steps each line needs to reach the same height.",
        source=f"{P1}, Figure 1(a); {P2}, Figure 1",
        x=_steps(grid),
        y=Axis("accuracy", percent=True),
        panels=_per_rate(grid, panels),
        band=_SEEDS if len(grid.seeds) > 1 else "",
        columns=2,
        findings=_found(grid, find),
    )


def _against_rate(grid: Grid, summary: Summary) -> Chart:
    percent = summary.higher_is_better
    lines = []
    for index, arm in enumerate(grid.arms):
        outcomes = [summary.outcome(arm.name, rate) for rate in grid.rates]
        if not any(one.final or one.diverged for one in outcomes):
            continue
        finals = [one.final for one in outcomes]
        y, low, high = (
            np.array([getattr(final, part) if final else math.nan for final in finals])
            for part in ("mean", "low", "high")
        )
        several = len(grid.seeds) > 1
        lines.append(
            Line(
                index,
                np.array(grid.rates),
                y,
                low if several else None,
                high if several else None,
                [
                    # With no seed left there is no value: the mark stands at the foot.
                    End(one.lr, one.final.mean if one.final else -math.inf)
                    for one in outcomes
                    if one.diverged
                ],
            )
        )
    enough = len(grid.rates) > 1
    covers = (0.0, 1.0) if percent else fit(lines, log=True)
    rules = _guessing(grid) if percent else []
    return Chart(
        id="learning-rate",
        title=f"Final {summary.measure} against learning rate",
        how="Each point is a learning rate that was tried, each line an arm; a line that stays "
        + ("high" if percent else "low")
        + " over a wide range forgives a badly chosen rate.",
        source=f"{P1}, Section 4.2.1; {P2}, Figure 1",
        x=Axis("learning rate", type="log", ticks=grid.rates, domain=_around(grid.rates)),
        y=Axis(summary.measure, type="linear" if percent else "log", percent=percent),
        panels=[Panel("", lines, domain=covers, rules=rules)] if enough and lines else [],
        band=_SEEDS if len(grid.seeds) > 1 else "",
        dots=True,
        findings={"": findings.against_rate(summary, grid)},
    )


def _around(rates: list[float]) -> tuple[float, float]:
    """A log axis on which the outermost points do not sit on the frame."""
    margin = (rates[-1] / rates[0]) ** 0.05
    return rates[0] / margin, rates[-1] * margin


def _by_arm(
    grid: Grid,
    quantities: tuple[str, str, str],
    *,
    id: str,
    title: str,
    how: str,
    source: str,
    y: Axis,
    band: str,
    find: Callable[[Grid, float, str], str],
) -> Chart:
    """A middle and a band over the steps, one panel an arm and a layer, as [P1] Figure 1(b, c)."""
    low, middle, high = quantities
    layers = measured_layers(grid, middle)
    hidden = _hidden(layers)

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            drawn = [
                (arm, line)
                for arm in grid.arms
                if (line := _band_line(grid, arm, rate, low, high, middle, layer))
            ]
            covers = fit([line for _, line in drawn])
            for arm, line in drawn:
                yield Panel(
                    f"layer {layer}, {arm.label}", [line], rate=i, layer=layer, domain=covers
                )

    return Chart(
        id=id,
        title=title,
        how=how,
        source=source,
        x=_steps(grid),
        y=y,
        panels=_per_rate(grid, panels),
        band=band,
        columns=len(grid.arms),
        overview=_overview(layers, hidden),
        findings=_found(grid, lambda grid, rate: find(grid, rate, hidden[-1])) if layers else {},
    )


def _percentiles(grid: Grid) -> Chart:
    return _by_arm(
        grid,
        ("activation/p15", "activation/p50", "activation/p85"),
        id="percentiles",
        title="What one unit receives: 15th, 50th and 85th percentile",
        how="The line is the median over the batch of the input of one unit's nonlinearity, the "
        "band reaches from the 15th to the 85th percentile (means over the seeds); where they "
        "wander, the unit has to learn from a moving target.",
        source=f"{P1}, Figure 1(b, c)",
        y=Axis("input of the unit's nonlinearity"),
        band="15th to 85th percentile",
        find=findings.percentiles,
    )


def _moments(grid: Grid) -> Chart:
    """Mean and standard deviation are one series each: the band is made of both."""
    layers = measured_layers(grid, "activation/mean")
    hidden = _hidden(layers)

    def line(arm: Arm, rate: float, layer: str) -> Line | None:
        mean = grid.series(arm, rate, "activation/mean", layer)
        std = grid.series(arm, rate, "activation/std", layer)
        made = _line(grid, arm, rate, mean, several=False)
        if mean is None or std is None or made is None:
            return None
        return Line(made.arm, made.x, made.y, mean.y - std.y, mean.y + std.y, ends=made.ends)

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            drawn = [(arm, made) for arm in grid.arms if (made := line(arm, rate, layer))]
            covers = fit([made for _, made in drawn])
            for arm, made in drawn:
                yield Panel(
                    f"layer {layer}, {arm.label}", [made], rate=i, layer=layer, domain=covers
                )

    return Chart(
        id="moments",
        title="What all units of a layer receive: mean and standard deviation",
        how="The line is the mean over the batch and all units of the inputs of the nonlinearity, "
        "the band one standard deviation to each side (means over the seeds); a band that grows "
        "wide drives a saturating unit to where its gradient vanishes.",
        source=f"{P1}, Section 3",
        x=_steps(grid),
        y=Axis("inputs of the nonlinearity"),
        panels=_per_rate(grid, panels),
        band="mean − to mean + one standard deviation",
        columns=len(grid.arms),
        overview=_overview(layers, hidden, 1),
        findings=_found(grid, lambda grid, rate: findings.spread(grid, rate, hidden[-1]))
        if layers
        else {},
    )


def _nearest(steps: Sequence[int], wanted: Sequence[float]) -> list[int]:
    """The recorded steps nearest to fractions of the way, without repetition."""
    last = max(steps)
    found = [min(steps, key=lambda step: abs(step - share * last)) for share in wanted]
    return list(dict.fromkeys(found))


def _histograms(grid: Grid) -> Chart:
    layers = measured_layers(grid, "activation/low")
    columns = 3

    def line(index: int, arm: Arm, rate: float, layer: str, step: int) -> Line | None:
        for cell in grid.at(arm, rate):
            low = cell.series("activation/low", layer).get(step, math.nan)
            high = cell.series("activation/high", layer).get(step, math.nan)
            shares = [
                cell.series("activation/histogram", layer, i).get(step, 0.0) for i in range(_BINS)
            ]
            if math.isfinite(low) and math.isfinite(high) and max(shares) > 0:
                heights = np.array([*shares, 0.0]) / max(shares)
                return Line(index, np.linspace(low, high, _BINS + 1), heights)
        return None

    def panels(i: int, rate: float) -> Iterable[Panel]:
        for layer in reversed(layers):
            steps = sorted(
                {
                    step
                    for arm in grid.arms
                    for cell in grid.at(arm, rate)
                    for step in cell.series("activation/low", layer)
                }
            )
            for step in _nearest(steps, (0, 0.5, 1)) if steps else []:
                drawn = (line(n, arm, rate, layer, step) for n, arm in enumerate(grid.arms))
                yield Panel(
                    f"layer {layer}, step {count(step)}",
                    [made for made in drawn if made],
                    rate=i,
                    layer=layer,
                    domain=(0.0, 1.05),
                )

    return Chart(
        id="histograms",
        title="How the inputs of the nonlinearities are distributed",
        how="Start, middle and end of training, for the first seed: each outline is the histogram "
        "of all the layer's values in one batch, scaled so that its tallest bin is 1; compare "
        "how wide the outlines are and where they stand.",
        source=f"after {P1}, Section 3",
        x=Axis("input of the nonlinearity"),
        y=Axis("frequency, tallest bin = 1"),
        panels=_per_rate(grid, panels),
        shape="step",
        columns=columns,
        overview=_overview(layers, _hidden(layers), 1),
    )


def _depth(grid: Grid) -> Chart:
    layers = measured_layers(grid, "gradient/norm")
    places = np.arange(1.0, len(layers) + 1)

    def line(index: int, arm: Arm, rate: float, step: int) -> Line | None:
        parts = []
        for layer in layers:
            series = grid.series(arm, rate, "gradient/norm", layer)
            at = np.flatnonzero(series.x == step) if series else np.array([])
            parts.append(
                [values[at[0]] for values in (series.y, series.low, series.high)]
                if series and len(at)
                else [math.nan] * 3
            )
        y, low, high = np.array(parts).T
        if not np.isfinite(y).any():
            return None
        band = (low, high) if len(grid.seeds) > 1 else (None, None)
        return Line(index, places, y, *band)

    def panels(i: int, rate: float) -> Iterable[Panel]:
        steps = sorted(
            {
                int(step)
                for arm in grid.arms
                for layer in layers
                if (series := grid.series(arm, rate, "gradient/norm", layer))
                for step in series.x
            }
        )
        drawn = []
        for step in _nearest(steps, (0, 0.1, 0.5, 1)) if steps else []:
            tried = (line(n, arm, rate, step) for n, arm in enumerate(grid.arms))
            drawn.append((step, [made for made in tried if made]))
        covers = fit([made for _, lines in drawn for made in lines], log=True)
        for step, lines in drawn:
            yield Panel(f"step {count(step)}", lines, rate=i, domain=covers)

    return Chart(
        id="gradients",
        title="Gradient norms by depth",
        how="Norm of the gradient of each layer's weight, the first layer on the left; where a "
        "line falls steeply towards the left, the early layers hardly learn, and where it is "
        "level, all layers learn alike.",
        source=f"{P1}, Section 3.3",
        x=Axis("layer", names=layers),
        y=Axis("gradient norm", type="log"),
        panels=_per_rate(grid, panels),
        band=_SEEDS if len(grid.seeds) > 1 else "",
        dots=True,
        columns=4,
        findings=_found(grid, findings.depth),
    )


_SHIFT = (
    "The gradient of a layer is computed twice on the same batch, before (G) and after (G′) the "
    "layers in front of it were updated"
)


def _shift_distance(grid: Grid) -> Chart:
    return _layered(
        grid,
        "shift/l2",
        id="shift-distance",
        title="Internal covariate shift: distance of the gradients",
        how=f"{_SHIFT}: 0 means that their update made no difference to it. Larger gradients are "
        "further apart, which the angle below does not depend on.",
        source=f"{P2}, Definition 2.1 and Figure 3",
        y=Axis("‖G − G′‖₂"),
        find=lambda grid, rate: findings.shift(grid, rate, "shift/l2"),
        skip_first=True,
    )


def _shift_cosine(grid: Grid) -> Chart:
    return _layered(
        grid,
        "shift/cosine",
        id="shift-cosine",
        title="Internal covariate shift: angle between the gradients",
        how=f"{_SHIFT}: 1 means that it still points the same way, 0 that it points anywhere.",
        source=f"{P2}, Definition 2.1 and Figure 3",
        y=Axis("cosine of ∠(G, G′)"),
        find=lambda grid, rate: findings.shift(grid, rate, "shift/cosine"),
        skip_first=True,
        domain=(-1.0, 1.05),
    )


def _landscape(
    grid: Grid,
    make: Callable[[float], list[Line]],
    *,
    id: str,
    title: str,
    how: str,
    source: str,
    y: Axis,
    band: str,
    find: Find,
    rules: Callable[[float], list[Rule]] = lambda rate: [],
) -> Chart:
    def panels(i: int, rate: float) -> Iterable[Panel]:
        lines = make(rate)
        yield Panel("", lines, rate=i, domain=fit(lines, log=True), rules=rules(rate))

    return Chart(
        id=id,
        title=title,
        how=how,
        source=source,
        x=_steps(grid),
        y=y,
        panels=_per_rate(grid, panels),
        band=band,
        findings=_found(grid, find),
    )


def _edges(grid: Grid, low: str, high: str) -> Callable[[float], list[Line]]:
    def make(rate: float) -> list[Line]:
        lines = (_band_line(grid, arm, rate, low, high) for arm in grid.arms)
        return [line for line in lines if line]

    return make


def _loss_variation(grid: Grid) -> Chart:
    return _landscape(
        grid,
        _edges(grid, "landscape/loss_low", "landscape/loss_high"),
        id="loss-variation",
        title="Loss along the gradient",
        how="From each step the network tries shorter and longer steps along the gradient: the "
        "band holds all losses it finds (edges: means over the seeds); a narrow band means that "
        "the loss changes little and predictably.",
        source=f"{P2}, Figure 4(a)",
        y=Axis("loss", type="log"),
        band="smallest to largest along the gradient",
        find=findings.loss_variation,
    )


def _predictiveness(grid: Grid) -> Chart:
    return _landscape(
        grid,
        _edges(grid, "landscape/gradient_low", "landscape/gradient_high"),
        id="predictiveness",
        title="Change of the gradient along the gradient",
        how="How far the gradient found there is from the gradient here (edges: means over the "
        "seeds); the lower, the longer the gradient remains a good guide.",
        source=f"{P2}, Figure 4(b)",
        y=Axis("‖∇L(θ) − ∇L(θ − ηg)‖₂", type="log"),
        band="smallest to largest along the gradient",
        find=findings.predictiveness,
    )


def _smoothness(grid: Grid) -> Chart:
    plain = any(cell.settings["optimizer"] == "sgd" for cell in grid.cells)

    def rules(rate: float) -> list[Rule]:
        return [Rule(2 / rate, f"2 / learning rate = {number(2 / rate)}")] if plain else []

    edge = (
        " Plain gradient descent tends to work its way up to the dotted line, 2 divided by the "
        "learning rate (Cohen et al. 2021)."
        if plain
        else ""
    )
    return _landscape(
        grid,
        lambda rate: _seed_lines(grid, rate, "landscape/smoothness"),
        id="smoothness",
        title="Effective smoothness",
        how="The largest change of the gradient divided by the distance walked: the lower and the "
        f"steadier, the smoother the landscape along the way.{edge}",
        source=f"{P2}, Figure 4(c)",
        y=Axis("effective β", type="log"),
        band=_SEEDS if len(grid.seeds) > 1 else "",
        find=findings.smoothness,
        rules=rules,
    )


def _running_mean(grid: Grid) -> Chart:
    return _layered(
        grid,
        "running/mean_error",
        id="running-mean",
        title="Running mean against batch mean",
        how="How far the mean that evaluation will use is from that of the current batch, in "
        "standard deviations of the batch; it cannot reach 0, because no two batches are alike.",
        source=f"{P1}, Algorithm 2",
        y=Axis("distance in standard deviations", type="log"),
        find=lambda grid, rate: findings.gap(
            grid, rate, "running/mean_error", "distance in standard deviations"
        ),
    )


def _running_variance(grid: Grid) -> Chart:
    return _layered(
        grid,
        "running/log_variance_ratio",
        id="running-variance",
        title="Running variance against batch variance",
        how="Logarithm of the running variance divided by that of the current batch: 0 means "
        "equal, above 0 that evaluation divides by too much, below 0 by too little.",
        source=f"{P1}, Algorithm 2",
        y=Axis("ln(running variance / batch variance)"),
        find=lambda grid, rate: findings.gap(
            grid, rate, "running/log_variance_ratio", "logarithm of the ratio"
        ),
    )


def _weight_norm(grid: Grid) -> Chart:
    return _layered(
        grid,
        "weight/norm",
        id="weight-norm",
        title="Weight norms",
        how="Behind a normalization the scale of a weight does not change what the network "
        "computes, only how large a step of the same length is in comparison.",
        source=f"{P1}, Section 3.3",
        y=Axis("norm of the layer's weight"),
        find=findings.weights,
    )


def _effective_rate(grid: Grid) -> Chart:
    return _layered(
        grid,
        "weight/effective_lr",
        id="effective-rate",
        title="Effective learning rate",
        how="Learning rate divided by the squared weight norm: where a normalization follows the "
        "layer, this decides how fast the direction of the weight turns.",
        source="van Laarhoven 2017, arXiv 1706.05350",
        y=Axis("learning rate / ‖w‖²", type="log"),
        find=findings.effective_rate,
    )
