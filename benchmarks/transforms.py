"""The verbs on real architectures, what they cost and save: ``python -m benchmarks.transforms``.

``table`` runs each verb on each architecture of timm's and prints what it did, the largest
difference of the output over its largest value where it must stay the same, and the seconds it
took. The others are measured in turns: ``fold``, folded against unfolded inference of resnet50;
``recalibrate``, it against plain passes over the same data; ``scan``, rewriting 500 layers.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from tests.transforms.networks_timm import ARCHITECTURES, images, network, timm
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import batchnorm
from benchmarks.measure import interleaved


def seconds(call: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """The median of what one took over what the other took in the same turn."""
    return median(a / b for a, b in zip(times[over], times[under], strict=True))


def difference(found: Tensor, expected: Tensor) -> str:
    return f"{float((found - expected).abs().max() / expected.abs().max()):.1e}"


def table() -> None:
    print(f"{'architecture':<22} {'verb':<12} {'did':<34} {'difference':<11} seconds")
    x, other = images(2), images(2, seed=5)
    batches = [images(8, seed=seed) for seed in (2, 3)]
    verbs: dict[str, Callable[[nn.Module], str]] = {
        "convert": lambda m: f"{_converted(m)} converted",
        "fold": lambda m: _count(batchnorm.fold(m, x), "folded"),
        "strip_bias": lambda m: _count(batchnorm.strip_bias(_biased(m), x), "stripped"),
        "freeze": lambda m: f"{len(batchnorm.freeze(m))} frozen",
        "recalibrate": lambda m: f"{len(batchnorm.recalibrate(m, batches).values)} recalibrated",
        "adapt": lambda m: f"{batchnorm.adapt(m, batches, entropy_lr=1e-3).samples} samples",
        "average": lambda m: _average(m, batches),
        "zero_gamma": lambda m: _count(batchnorm.zero_gamma(m, x), "zeroed"),
        "replace": lambda m: f"{len(batchnorm.replace(m, 'group', x).changes)} replaced",
    }
    same = ("convert", "fold", "strip_bias", "freeze")  # do not change what is computed
    for architecture in ARCHITECTURES:
        original = network(architecture)
        for verb, call in verbs.items():
            model = copy.deepcopy(original)
            with torch.no_grad():
                before = (_biased(model) if verb == "strip_bias" else model)(other)
            did = []

            def timed(call: Any = call, model: nn.Module = model, did: list[str] = did) -> None:
                try:
                    did.append(call(model))
                except ValueError as error:
                    did.append(str(error).partition(":")[0].partition(";")[0])

            taken = seconds(timed)
            with torch.no_grad():
                changed = difference(model.eval()(other), before) if verb in same else ""
            print(
                f"{architecture:<22} {verb:<12} {did[0]:<34} {changed:<11} {taken:.2f}", flush=True
            )


def _count(report: object, what: str) -> str:
    return f"{len(getattr(report, what))} {what}, {len(report.left)} left"  # type: ignore[attr-defined]


def _converted(model: nn.Module) -> int:
    batchnorm.convert(model)
    return sum(type(m).__module__.startswith("batchnorm.") for m in model.modules())


def _biased(model: nn.Module) -> nn.Module:
    """Give every convolution a bias, to be stripped again."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            # Small, as the running means know nothing of them.
            bias = 0.01 * torch.randn(module.out_channels, generator=generator)
            module.bias = nn.Parameter(bias)
    return model


def _average(model: nn.Module, batches: list[Tensor]) -> str:
    states = [
        {n: v * s if v.is_floating_point() else v for n, v in model.state_dict().items()}
        for s in (0.9, 1.1)
    ]
    batchnorm.average(model, states, loader=batches)
    return "2 snapshots, recomputed"


def speed(parts: list[str], time_for: float) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "fold" in parts:
        _fold_speed(time_for)
    if "recalibrate" in parts:
        _recalibrate_speed(time_for)
    if "scan" in parts:
        _scan_speed()


def _fold_speed(time_for: float) -> None:
    model = timm().create_model("resnet50").eval()
    folded, rival = copy.deepcopy(model), fuse(model)
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batchnorm.fold(folded, torch.randn(1, 3, 224, 224))
    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224)
        networks = {"plain": model, "channels_last": laid_out, "folded": folded, "torch.fx": rival}
        with torch.inference_mode():
            times = interleaved({n: partial(net, x) for n, net in networks.items()}, time_for)
        print(
            f"fold, resnet50, batch {batch}: {median(times['plain']) * 1e3:.0f} ms, folded "
            f"{median(times['folded']) * 1e3:.0f} ms: {ratio(times, 'plain', 'folded'):.2f}× "
            f"({ratio(times, 'channels_last', 'folded'):.2f}× plain in channels_last; "
            f"torch.fx's fuse: {ratio(times, 'plain', 'torch.fx'):.2f}×), "
            f"{len(times['plain'])} turns"
        )


def _recalibrate_speed(time_for: float) -> None:
    model = timm().create_model("resnet50").eval()
    batches = [torch.randn(16, 3, 96, 96) for _ in range(2)]

    def passes(training: bool) -> None:
        with torch.no_grad():
            model.train(training)
            for x in batches:
                model(x)
        model.eval()

    times = interleaved(
        {
            "ours": lambda: batchnorm.recalibrate(model, batches),
            "evaluation": lambda: passes(False),
            "training": lambda: passes(True),
        },
        time_for,
    )
    print(
        f"recalibrate, resnet50, 32 images of 96×96: {median(times['ours']):.2f} s; "
        f"{ratio(times, 'ours', 'evaluation'):.2f}× the passes in evaluation, "
        f"{ratio(times, 'ours', 'training'):.2f}× those in training, {len(times['ours'])} turns"
    )


def _scan_speed() -> None:
    blocks = [
        part for _ in range(250) for part in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    ]
    model = nn.Sequential(*blocks).eval()
    for layer in model[1::2]:
        nn.init.uniform_(layer.running_var, 0.9, 1.1)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        forward = median(seconds(lambda: model(x)) for _ in range(5))
    verbs: dict[str, Callable[[nn.Module], object]] = {
        "fold": lambda m: batchnorm.fold(m, x),
        "strip_bias": lambda m: batchnorm.strip_bias(m, x),
        "convert": batchnorm.convert,
        "replace": lambda m: batchnorm.replace(m, "group", x),
    }
    for verb, call in verbs.items():
        taken = seconds(lambda: call(copy.deepcopy(model)))  # noqa: B023
        print(
            f"{verb}, 250 convolutions and 250 batch norms: {taken:.2f} s (forward {forward:.2f} s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", nargs="*", default=["table", "fold", "recalibrate", "scan"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=12, help="for each comparison")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "table" in options.what:
        table()
    speed(options.what, options.seconds)


if __name__ == "__main__":
    main()
