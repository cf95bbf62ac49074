"""What is measured, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.ops import reference

KINK = 1e-5  # some hundred roundings of float32 at z of order 1

# ResNet-50 at batch 32, then other uses.
SHAPES: dict[str, tuple[int, ...]] = {
    "32x64x112x112": (32, 64, 112, 112),
    "32x64x56x56": (32, 64, 56, 56),
    "32x256x56x56": (32, 256, 56, 56),
    "32x128x28x28": (32, 128, 28, 28),
    "32x512x28x28": (32, 512, 28, 28),
    "32x256x14x14": (32, 256, 14, 14),
    "32x1024x14x14": (32, 1024, 14, 14),
    "32x512x7x7": (32, 512, 7, 7),
    "32x2048x7x7": (32, 2048, 7, 7),
    "128x64x32x32": (128, 64, 32, 32),
    "4096x1024": (4096, 1024),
    "60x100": (60, 100),
    "8x256x64": (8, 256, 64),
}
LAYOUTS = ("contiguous", "channels_last")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("plain", "relu", "add_relu")
MODES = ("forward", "forward_backward", "inference")
# Peers that compile for each case, or convert its layout, are measured on these.
FEW = ("32x256x56x56", "32x1024x14x14", "128x64x32x32", "60x100")


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    shape: str
    layout: str
    type: str
    kind: str
    mode: str

    @property
    def name(self) -> str:
        return " ".join((self.shape, self.layout, self.type, self.kind, self.mode))

    def bytes(self) -> int:
        size = torch.Size(SHAPES[self.shape]).numel()
        return size * TYPES[self.type].itemsize

    def floor_bytes(self) -> int:
        """The bytes that must move (the table of the design's facts): a contiguous channel fits in
        cache between its two visits, channels_last must be streamed twice.
        """
        t = self.bytes()
        added = self.kind == "add_relu"
        if self.mode == "inference":
            return (2 + added) * t
        once = self.layout == "contiguous"
        total = ((2 if once else 3) + added) * t
        if self.mode == "forward_backward":
            total += ((3 if once else 5) + added) * t
        return total


@dataclass
class Inputs:
    """The tensors of a case."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


def all_cases() -> Iterator[Case]:
    for shape, size in SHAPES.items():
        for layout in LAYOUTS if len(size) == 4 else LAYOUTS[:1]:
            for type_name in TYPES:
                for kind in KINDS:
                    for mode in MODES:
                        yield Case(shape, layout, type_name, kind, mode)


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(0)
    shape, c = SHAPES[case.shape], SHAPES[case.shape][1]

    def full() -> Tensor:
        values = torch.randn(shape).to(TYPES[case.type])
        if case.layout == "channels_last":
            values = values.contiguous(memory_format=torch.channels_last)
        return values

    inputs = Inputs(
        x=full(),
        dy=full(),
        residual=full() if case.kind == "add_relu" else None,
        weight=torch.rand(c) + 0.5,
        bias=torch.randn(c),
        mean=torch.zeros(c),
        var=torch.ones(c),
    )
    if case.mode == "forward_backward" and case.kind != "plain":
        # Within rounding of ReLU's kink either slope is right: such an element takes no part in
        # the backward pass, so that one flip does not pass for an error.
        x, residual = inputs.x.double(), inputs.residual
        mean, var = reference.moments(x)
        added = None if residual is None else residual.double()
        z = reference.normalize(x, mean, var, inputs.weight, inputs.bias, added, 1e-5, 0)
        inputs.dy[z.abs() < KINK] = 0
    return inputs
