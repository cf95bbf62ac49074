"""What is measured, as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from batchnorm.ops import reference

KINK = 1e-5  # some hundred roundings of float32 at z of order 1

# ResNet-50 at batch 32, then other uses.
SHAPES = (
    "32x64x112x112",
    "32x64x56x56",
    "32x256x56x56",
    "32x128x28x28",
    "32x512x28x28",
    "32x256x14x14",
    "32x1024x14x14",
    "32x512x7x7",
    "32x2048x7x7",
    "128x64x32x32",
    "4096x1024",
    "60x100",
    "8x256x64",
)
# ResNet-50 at batch 256, then what fits on a GPU's chip.
GPU_SHAPES = (
    "256x64x112x112",
    "256x64x56x56",
    "256x256x56x56",
    "256x128x28x28",
    "256x512x28x28",
    "256x256x14x14",
    "256x1024x14x14",
    "256x512x7x7",
    "256x2048x7x7",
    "32x512x7x7",
    "32x2048x7x7",
    "32x256x14x14",
    "4096x1024",
    "128x64x32x32",
)
# Layouts and types.
FORMATS = (
    ("contiguous", "float32"),
    ("contiguous", "bfloat16"),
    ("channels_last", "float32"),
    ("channels_last", "bfloat16"),
)
# cuDNN has kernels of its own for channels_last float16.
GPU_FORMATS = (
    ("contiguous", "bfloat16"),
    ("channels_last", "bfloat16"),
    ("channels_last", "float16"),
)
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("plain", "relu", "add_relu")
MODES = ("forward", "forward_backward", "inference")
# How many tensors of the size of x must move when everything is fused, by mode and by whether a
# residual is added: where the second pass streams x again, and where x was held on the chip or in
# cache in between. The gate's one bit a value is neglected.
MOVED = {
    ("forward", False): (3, 2),
    ("forward", True): (4, 3),
    ("forward_backward", False): (3 + 5, 2 + 3),
    ("forward_backward", True): (4 + 6, 3 + 4),
    ("inference", False): (2, 2),
    ("inference", True): (3, 3),
}
# So many values of each of a case's tensors stay together in the cache of one core.
VALUES_IN_CACHE = 1 << 16
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

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(map(int, self.shape.split("x")))

    def in_cache(self) -> Case:
        """As much of it as stays in a core's cache, its rows as long and its loops the same."""
        samples, channels, *axes = self.size
        positions = math.prod(axes)
        if self.layout == "contiguous" and axes:
            channels = min(channels, max(4, VALUES_IN_CACHE // (samples * positions)))
        else:
            channels = min(channels, 128)
        samples = min(samples, max(2, VALUES_IN_CACHE // (channels * positions)))
        return replace(self, shape="x".join(map(str, (samples, channels, *axes))))

    def values(self) -> int:
        return math.prod(self.size)

    def bytes(self) -> int:
        return self.values() * TYPES[self.type].itemsize

    def moved_bytes(self, held: bool) -> int:
        return MOVED[self.mode, self.kind == "add_relu"][held] * self.bytes()

    def written_bytes(self) -> int:
        """Of y, and of dx, and of dz where a residual is added."""
        backward = 1 + (self.kind == "add_relu") if self.mode == "forward_backward" else 0
        return (1 + backward) * self.bytes()

    def tensors(self) -> int:
        """How many different ones are moved: backward reads x again."""
        return MOVED[self.mode, self.kind == "add_relu"][True] - (self.mode == "forward_backward")


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


def cases(shapes: Iterable[str], formats: Iterable[tuple[str, str]]) -> Iterator[Case]:
    for shape, (layout, type_name) in product(shapes, formats):
        if layout == "contiguous" or shape.count("x") == 3:
            for kind, mode in product(KINDS, MODES):
                yield Case(shape, layout, type_name, kind, mode)


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    channels = case.size[1]

    def full() -> Tensor:
        values = torch.randn(case.size, device=device).to(TYPES[case.type])
        if case.layout == "channels_last":
            values = values.contiguous(memory_format=torch.channels_last)
        return values

    x = full()
    inputs = Inputs(
        x=x,
        # Not only noise, of which backward takes so little away that nobody would miss it.
        dy=full() + 0.5 * x + 0.5,
        residual=full() if case.kind == "add_relu" else None,
        weight=torch.rand(channels, device=device) + 0.5,
        bias=torch.randn(channels, device=device),
        mean=torch.zeros(channels, device=device),
        var=torch.ones(channels, device=device),
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
