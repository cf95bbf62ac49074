"""Random shapes, strides, types and options against the reference."""

from __future__ import annotations

import random

import pytest
import torch
from tests.device import INTERPRETED
from tests.kernels.cases import LAYOUTS, Case
from tests.tolerances import KERNEL_BY_TYPE

from batchnorm.ops.reference import ACTIVATIONS

CASES = 45 if INTERPRETED else 1500
BATCHES = 15
LARGEST = 3000 if INTERPRETED else 200_000

SIZES = [1, 1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 33, 49, 63, 64, 65, 100, 129, 500]


def draw(rng: random.Random) -> Case:
    torch.manual_seed(rng.getrandbits(32))
    rank = rng.choice([2, 2, 3, 4, 4, 4, 5])
    while True:
        shape = [rng.choice(SIZES) for _ in range(rank)]
        # One value per channel leaves nothing to normalise.
        if torch.Size(shape).numel() <= LARGEST and torch.Size(shape).numel() > 4 * shape[1]:
            break
    dtype = rng.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])
    layouts = list(LAYOUTS.values())
    c = shape[1]
    parameters = torch.float64 if dtype == torch.float64 else torch.float32

    def full(scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        values = torch.randn(shape, dtype=torch.float64) * scale + offset
        return rng.choice(layouts)(values.to(dtype))

    return Case(
        x=full(rng.choice([0.5, 1, 20]), rng.choice([0, 1, -30])),
        dy=full(),
        weight=rng.choice([None, torch.randn(c).to(parameters)]),
        bias=rng.choice([None, torch.randn(c).to(parameters)]),
        residual=rng.choice([None, full()]),
        eps=rng.choice([1e-5, 1e-3]),
        activation=rng.randrange(len(ACTIVATIONS)),
    )


@pytest.mark.parametrize("seed", range(BATCHES))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(CASES // BATCHES):
        case = draw(rng)
        errors = case.errors()
        bound = KERNEL_BY_TYPE[case.x.dtype]
        excess = {k: v for k, v in errors.items() if not v <= bound}
        assert not excess, (
            excess,
            case.x.shape,
            case.x.stride(),
            case.x.dtype,
            ACTIVATIONS[case.activation],
            case.residual is not None,
        )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0, 4), (0, 0)])
def test_fuzz_nothing_to_normalise(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with pytest.raises(RuntimeError, match="empty"):
        Case(x=x, dy=x).forward()
