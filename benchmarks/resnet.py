"""``python -m benchmarks.resnet``: what normalisation costs a ResNet-18 step.

Batch 64 of 32×32 images, one SGD step, with torch's norms, with ours (activation and addition
fused) and with none: the identity, whose step is what normalisation for nothing would take, and
one that keeps for backward what a norm keeps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.nn
from benchmarks.environment import environment
from benchmarks.measure import interleaved, median_ratio, spread


class Torch(nn.Module):
    """torch's norm, then the addition and ReLU, in place."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__()
        self.norm, self.relu = self.make(channels), relu

    def make(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y = y + residual if y is x else y.add_(residual)
        return F.relu(y, inplace=True) if self.relu else y


class Identity(Torch):
    def make(self, channels: int) -> nn.Module:
        return nn.Identity()


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return dy


class Kept(nn.Module):
    """No norm, but its input is kept for backward: ReLU has to write elsewhere."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = Keep.apply(x)  # type: ignore[no-untyped-call]
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=residual is not None) if self.relu else y


def ours(channels: int, relu: bool = True) -> nn.Module:
    return batchnorm.nn.BatchNorm2d(channels, activation="relu" if relu else None)


Norm = Callable[..., nn.Module]
NORMS: dict[str, Norm] = {"torch": Torch, "ours": ours, "kept": Kept, "identity": Identity}


class Residual(nn.Module):
    """A body and a shortcut past it, added where the last norm activates."""

    def __init__(
        self, norm: Norm, body: list[nn.Module], inside: int, channels: int, stride: int
    ) -> None:
        super().__init__()
        self.channels = channels
        self.body, self.norm = nn.Sequential(*body), norm(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != channels:
            convolution = nn.Conv2d(inside, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, norm(channels, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x), self.shortcut(x))


def basic(norm: Norm, inside: int, width: int, stride: int) -> Residual:
    body = [
        nn.Conv2d(inside, width, 3, stride, 1, bias=False),
        norm(width),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
    ]
    return Residual(norm, body, inside, width, stride)


def bottleneck(norm: Norm, inside: int, width: int, stride: int) -> Residual:
    body = [
        nn.Conv2d(inside, width, 1, bias=False),
        norm(width),
        nn.Conv2d(width, width, 3, stride, 1, bias=False),
        norm(width),
        nn.Conv2d(width, 4 * width, 1, bias=False),
    ]
    return Residual(norm, body, inside, 4 * width, stride)


class ResNet(nn.Module):
    def __init__(
        self,
        norm: Norm,
        stem: list[nn.Module],
        block: Callable[[Norm, int, int, int], Residual],
        depths: tuple[int, ...],
        classes: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem)
        blocks, inside = [], 64
        for stage, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(norm, inside, 64 << stage, stride))
                inside = blocks[-1].channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet18(norm: Norm) -> ResNet:
    """For images of 32×32."""
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), norm(64)]
    return ResNet(norm, stem, basic, (2, 2, 2, 2), 10)


def resnet50(norm: Norm) -> ResNet:
    """For images of 224×224."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.MaxPool2d(3, 2, 1)]
    return ResNet(norm, stem, bottleneck, (3, 4, 6, 3), 1000)


def step(
    model: nn.Module, images: Tensor, target: Tensor, mixed: bool = False
) -> Callable[[], Tensor]:
    """One step of training, which returns its loss; mixed: autocast to bfloat16."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def resnet18_step(norm: str, layout: torch.memory_format, batch: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = resnet18(NORMS[norm]).to(memory_format=layout)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
    return step(model, images, torch.randint(10, (batch,)))


def peak_mib() -> int:
    """The most memory that this process was given; ru_maxrss would include its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet", description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=40, help="per layout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), action="append")
    parser.add_argument("--peak", choices=NORMS, help="only print the peak memory of two steps")
    args = parser.parse_args()
    layouts = args.layout or ["contiguous", "channels_last"]
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    if args.peak:
        run = resnet18_step(args.peak, formats[layouts[0]], args.batch)
        run(), run()
        print(peak_mib())
        return
    report: dict[str, object] = {"environment": environment("cpu")}
    for layout in layouts:
        steps = {norm: resnet18_step(norm, formats[layout], args.batch) for norm in NORMS}
        first = {norm: float(run()) for norm, run in steps.items()}
        if not abs(first["ours"] - first["torch"]) < 1e-4:
            raise SystemExit(f"the losses disagree: {first}")
        times = interleaved(steps, args.seconds)
        best = {norm: 1e3 * min(t) for norm, t in times.items()}
        peak = {
            norm: int(
                subprocess.run(
                    [
                        *(sys.executable, "-m", "benchmarks.resnet", "--peak", norm),
                        *("--layout", layout, "--batch", str(args.batch)),
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for norm in NORMS
        }
        report[layout] = {
            "milliseconds": best,
            "over_identity": {
                norm: median_ratio(times[norm], times["identity"])
                for norm in ("torch", "ours", "kept")
            },
            "ours_over_kept": median_ratio(times["ours"], times["kept"]),
            "spread": {norm: spread(t) for norm, t in times.items()},
            "peak_mib": peak,
            "steps": len(times["ours"]),
        }
        print(layout, json.dumps(report[layout]))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "resnet.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
