"""A ResNet-50 step with torch's norms and with ours, eager and compiled; `benchmarks.cuda` runs it.

Images in channels_last, autocast to bfloat16 over weights in float32, as people train it; one SGD
step.
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
# Relative to torch's. Through 53 layers of bfloat16 the gradients themselves are soon apart, but
# not the loss (2 % at batch 16 of 32×32, less at more) nor the norm of the gradients: that is 5 %
# off, and 30 % to 100 % where the gradient does not pass through the statistics.
AGREEMENT = {"loss": 5e-2, "gradient": 0.15}


def agree(first: Mapping[str, Mapping[str, float]]) -> None:
    """Stop where the loss or the norm of the gradients of the first step is not that of torch."""
    for name, values in first.items():
        for what, tolerance in AGREEMENT.items():
            if not abs(values[what] / first["torch"][what] - 1) <= tolerance:
                raise SystemExit(f"ResNet-50: {name} is off in its {what}: {first}; no report")


def report(
    device: str,
    batch: int,
    size: int,
    seconds: float,
    out: Path,
    variants: Mapping[str, Callable[[], nn.Module]] = VARIANTS,
) -> None:
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=device)
    steps, first, peaks = {}, {}, {}
    for name, make in variants.items():
        torch.manual_seed(0)
        others = torch.cuda.memory_allocated() if device == "cuda" else 0
        model = make().to(device, memory_format=torch.channels_last)
        steps[name] = run = step(model, images, target, mixed=True)
        loss = float(run())
        gradient = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
        first[name] = {"loss": loss, "gradient": float(gradient)}
        if device == "cuda":  # not of the first step, where cuDNN tries what it will not keep
            torch.cuda.reset_peak_memory_stats()
            run()
            peaks[name] = (torch.cuda.max_memory_allocated() - others) >> 20
    agree(first)
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
        "first_step": first,
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
