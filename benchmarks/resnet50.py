"""A ResNet-50 step with torch's norms and with ours, eager and compiled; `benchmarks.cuda` runs it.

Images in channels_last, autocast to bfloat16 over weights in float32, as people train it; one SGD
step, whose convolutions cuDNN chose by trying.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.environment import environment
from benchmarks.measure import TIMERS, interleaved, spread
from benchmarks.resnet import Torch, ours, resnet50, step

VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: resnet50(Torch),
    "torch compiled": lambda: torch.compile(resnet50(Torch)),
    "ours": lambda: resnet50(ours),
    "ours compiled": lambda: torch.compile(resnet50(ours)),
}
# Relative, bfloat16 through 53 layers and two runs that round otherwise: 6e-3 for the loss and
# 4e-2 for what a step takes off it at batch 16 of 64×64.
LOSS = 2e-2
FALL = 0.25


def agree(losses: Mapping[str, list[float]]) -> None:
    """Stop where a first loss, or what the first step took off it, is not that of torch."""
    first, second = losses["torch"]
    for name, (start, then) in losses.items():
        fall = (start - then) / (first - second)
        if not (abs(start - first) <= LOSS * first and abs(fall - 1) <= FALL):
            raise SystemExit(f"ResNet-50: the losses of {name} disagree: {losses}; no report")


def report(
    device: str,
    batch: int,
    size: int,
    seconds: float,
    out: Path,
    variants: Mapping[str, Callable[[], nn.Module]] = VARIANTS,
) -> None:
    torch.backends.cudnn.benchmark = True
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=device)
    steps, losses, peaks = {}, {}, {}
    for name, make in variants.items():
        torch.manual_seed(0)
        others = torch.cuda.memory_allocated() if device == "cuda" else 0
        model = make().to(device, memory_format=torch.channels_last)
        steps[name] = step(model, images, target, lr=1e-2, mixed=True)
        losses[name] = [float(steps[name]())]
        if device == "cuda":  # not of the first step, where cuDNN tries what it will not keep
            torch.cuda.reset_peak_memory_stats()
        losses[name].append(float(steps[name]()))
        if device == "cuda":
            peaks[name] = (torch.cuda.max_memory_allocated() - others) >> 20
    agree(losses)
    times = interleaved(steps, seconds, TIMERS[device])
    middle = {name: median(t) for name, t in times.items()}
    result = {
        "environment": environment(device),
        "batch": batch,
        "size": size,
        "milliseconds": {name: 1e3 * t for name, t in middle.items()},
        "ratio": {name: t / middle["ours"] for name, t in middle.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "peak_mib": peaks,
        "losses": losses,
        "steps": len(times["ours"]),
    }
    print("| ResNet-50 step | ms | ± | over ours | peak MiB |\n|---|---|---|---|---|")
    for name, t in middle.items():
        print(
            f"| {name} | {1e3 * t:.1f} | {result['spread'][name]:.0%} "
            f"| {result['ratio'][name]:.2f}× | {peaks.get(name, '')} |"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "resnet50.json").write_text(json.dumps(result, indent=1))
