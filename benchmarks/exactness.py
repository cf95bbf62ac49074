"""``python -m benchmarks.exactness``: errors against float64, ours and torch's side by side.

Of y, dx, dγ and dβ the largest error, over the largest value where that is more than 1: for each
layout, ratio of mean to standard deviation and, on the CPU, number of threads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import functional, ops
from batchnorm.ops import reference
from benchmarks.environment import environment

RESULTS = ("y", "dx", "dγ", "dβ")
CASES: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "contiguous 32x64x56x56": ((32, 64, 56, 56), torch.contiguous_format),
    "channels_last 32x64x56x56": ((32, 64, 56, 56), torch.channels_last),
    "channels_last 4x32x16x28x28": ((4, 32, 16, 28, 28), torch.channels_last_3d),
    "contiguous 32x512x7x7": ((32, 512, 7, 7), torch.contiguous_format),
    "N,C 200000x64": ((200_000, 64), torch.contiguous_format),
}
RATIOS = (0.0, 1e2, 1e3)
THREADS = (1, 2)


def gradients(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def exact(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    wide = [t.double() for t in (x, weight, bias, dy)]
    y, mean, var, _ = reference.training_forward(*wide[:3], None, 1e-5, 0)
    dx, _, dweight, dbias = reference.training_backward(
        wide[3], wide[0], mean, var, *wide[1:3], None, None, 1e-5, 0
    )
    return [y, dx, dweight, dbias]


def errors(got: list[Tensor], want: list[Tensor]) -> dict[str, float]:
    return {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1))
        for name, a, b in zip(RESULTS, got, want, strict=True)
    }


def measure(
    shape: tuple[int, ...], layout: torch.memory_format, ratio: float, device: str
) -> list[dict]:
    torch.manual_seed(0)
    x, dy = (torch.randn(shape, device=device).contiguous(memory_format=layout) for _ in range(2))
    x = x + ratio
    weight = torch.rand(shape[1], device=device) + 0.5
    bias = torch.randn(shape[1], device=device)
    want = exact(x, weight, bias, dy)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    rows = []
    for threads in THREADS if device == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        ours = gradients(functional.batch_norm(*leaves).y, leaves, dy)
        theirs = gradients(F.batch_norm(x, None, None, weight, bias, True), leaves, dy)
        rows.append({"threads": threads, "ours": errors(ours, want), "torch": errors(theirs, want)})
    return rows


def report(device: str, out: Path) -> None:
    results: dict[str, object] = {"environment": environment(device)}
    print("| layout and shape | mean/std | threads | " + " | ".join(RESULTS) + " |")
    print("|" + "---|" * (3 + len(RESULTS)))
    for name, (shape, layout) in CASES.items():
        for ratio in RATIOS:
            rows = measure(shape, layout, ratio, device)
            results[f"{name}, {ratio:g}"] = rows
            for row in rows:
                cells = [f"{row['ours'][r]:.1e} / {row['torch'][r]:.1e}" for r in RESULTS]
                print(f"| {name} | {ratio:g} | {row['threads']} | " + " | ".join(cells) + " |")
    print("\nEach cell: ours / torch's.")
    out.mkdir(parents=True, exist_ok=True)
    (out / "exactness.json").write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not ops.kernels()["cpu"].startswith("compiled"):
        raise SystemExit(f"the kernels are not in use: {ops.kernels()['cpu']}")
    report("cpu", args.out)


if __name__ == "__main__":
    main()
