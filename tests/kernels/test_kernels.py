"""The kernels against the reference in float64: on the CPU, in Triton's interpreter, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tests.device import DEVICE, INTERPRETED
from tests.kernels.cases import LAYOUTS, Case, are_kernels, channels_last, contiguous, error
from tests.tolerances import KERNEL, KERNEL_OFF_CENTRE

from batchnorm import ops
from batchnorm.ops import reference
from batchnorm.ops.reference import ACTIVATIONS

RELU = ACTIVATIONS.index("relu")


def test_the_kernels_are_used() -> None:
    assert are_kernels(), ops.kernels()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


LARGE = {
    "planes": ((8, 6, 56, 56), contiguous),
    "planes of blocks": ((3, 9, 97, 101), contiguous),
    "planes of chunks": ((2, 6, 260, 260), contiguous),
    "long planes": ((2, 3, 200_000), contiguous),
    "short rows": ((32, 40, 7, 7), contiguous),
    "few short rows": ((6, 40, 7, 7), contiguous),
    "tiny rows": ((64, 48, 2, 2), contiguous),
    "channels last": ((8, 64, 28, 28), channels_last),
    "few channels last": ((16, 3, 64, 64), channels_last),
    "channels last 3d": ((4, 24, 5, 14, 14), channels_last),
    "two axes": ((4096, 256), contiguous),
    "two axes in cache": ((400, 300), contiguous),
    "small": ((60, 100), contiguous),
}
SMALL = {
    "planes": ((5, 3, 30, 30), contiguous),
    "long planes": ((2, 2, 5000), contiguous),
    "short rows": ((8, 5, 7, 7), contiguous),
    "tiny rows": ((16, 5, 2, 2), contiguous),
    "channels last": ((5, 20, 9, 9), channels_last),
    "few channels last": ((4, 3, 30, 30), channels_last),
    "channels last 3d": ((4, 6, 2, 5, 5), channels_last),
    "two axes": ((400, 70), contiguous),
    "small": ((6, 10), contiguous),
}
SHAPES = SMALL if INTERPRETED else LARGE
WRITTEN = [(16, 70, 33, 9), (32, 40, 7, 7), (300, 130), (64, 600, 20, 20)]
if INTERPRETED:
    WRITTEN = [(3, 5, 33, 9), (6, 9, 7, 7), (50, 130)]

# What only the C++ kernels have: a number of threads, a store of large outputs, instruction sets.
of_the_cpu = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="of the C++ kernels")


def draw(shape: tuple[int, ...], ratio: float, seed: int = 0, offset_of_dy: float = 0.0) -> Case:
    """Values of mean/std ``ratio``; the gradient, too, may be off centre."""
    g = torch.Generator().manual_seed(seed)
    c = shape[1]
    return Case(
        x=torch.randn(shape, generator=g) + ratio,
        dy=torch.randn(shape, generator=g) + offset_of_dy,
        weight=torch.rand(c, generator=g) + 0.5,
        bias=torch.randn(c, generator=g),
    )


@pytest.mark.parametrize("number", [1] if INTERPRETED or DEVICE != "cpu" else [1, 2])
@pytest.mark.parametrize("ratio", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("threads")
def test_exact_in_every_layout(name: str, ratio: float, number: int) -> None:
    torch.set_num_threads(number)
    shape, layout = SHAPES[name]
    case = draw(shape, ratio, offset_of_dy=0.5)
    case.x, case.dy = layout(case.x), layout(case.dy)
    case.activation = RELU
    bound = KERNEL if ratio == 0 else KERNEL_OFF_CENTRE
    errors = case.errors()
    assert {k: v for k, v in errors.items() if not v <= bound} == {}


@of_the_cpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("threads")
def test_bitwise_the_same_for_any_number_of_threads(name: str, residual: bool) -> None:
    shape, layout = SHAPES[name]
    case = draw(shape, 3.0)
    case.x, case.dy = layout(case.x), layout(case.dy)
    case.activation = RELU
    case.residual = layout(torch.randn(shape)) if residual else None
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(case.run())
    for name, value in results[0].items():
        for other in results[1:]:
            assert torch.equal(value, other[name]), name


# Outputs of fewer bytes are never streamed; of more than 4 MB always, but where a core has a cache
# of more than half of that.
UNSTREAMED = 512 << 10
# More than 4 MB in 16 bits: rows on lines of the cache and off them, long and short.
STREAMED = {
    "rows on lines": ((72, 32, 32, 32), contiguous),
    "long rows": ((28, 64, 36, 38), contiguous),
    "long odd rows": ((32, 64, 37, 31), contiguous),
    "short rows": ((32, 360, 14, 14), contiguous),
    "joined rows": ((48, 1000, 7, 7), contiguous),
    "few joined rows": ((7, 7000, 7, 7), contiguous),
    "joined rows off bytes": ((48, 1011, 7, 7), contiguous),
    "joined rows of two words": ((40, 1040, 9, 7), contiguous),
    "joined longer rows": ((32, 440, 13, 13), contiguous),
    "long planes": ((1, 5, 500_003), contiguous),
    "narrow columns": ((16, 24, 80, 80), channels_last),
    "columns": ((16, 520, 17, 17), channels_last),
    "columns on lines": ((40, 1024, 8, 8), channels_last),
    "odd columns": ((5000, 601), contiguous),
    "columns in cache": ((500, 4800), contiguous),
    "odd columns in cache": ((500, 4811), contiguous),
}


@of_the_cpu
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_outputs_are_those_of_parts_too_small_for_it(
    name: str, dtype: torch.dtype, residual: bool
) -> None:
    shape, layout = STREAMED[name]
    case = draw(shape, 1.0, offset_of_dy=0.5)
    case.x, case.dy = layout(case.x.to(dtype)), layout(case.dy.to(dtype))
    case.activation = RELU
    case.residual = layout(torch.randn(shape).to(dtype)) if residual else None
    assert case.x.nbytes > 4 << 20
    got = case.run()
    assert torch.equal(got["y"], got["normalize"])
    assert torch.equal(got["dx"], got["apply"])
    if residual:
        assert torch.equal(got["dz"], case.dy * (got["y"] > 0))
        assert torch.equal(got["dz"], got["sums.dz"])
        assert torch.equal(got["gate"], reference.pack_gate(got["y"] > 0, case.x))
    count = case.x.numel() // shape[1]
    means = got["sum_dz"] / count, got["sum_dz_xhat"] / count
    given = got["mean"], got["var"], case.weight, case.bias

    def cut(values: torch.Tensor) -> list[torch.Tensor]:
        rows = values.movedim(1, -1).reshape(-1, shape[1])
        return list(rows.split((UNSTREAMED - 1) // (dtype.itemsize * shape[1])))

    residuals = cut(case.residual) if residual else None
    parts = zip(
        *(map(cut, (case.x, got["dz"] if residual else case.dy, got["y"], got["dx"]))), strict=True
    )
    for i, (x, dz, y, dx) in enumerate(parts):
        z = residuals[i] if residuals else None
        assert torch.equal(ops.normalize(x, *given, z, case.eps, RELU), y)
        activation = 0 if residual else RELU
        assert torch.equal(ops.backward_apply(dz, x, *given, *means, case.eps, activation), dx)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_extreme_magnitudes(scale: float, layout: str) -> None:
    case = draw((16, 12, 9, 9), 3.0)
    case.x = LAYOUTS[layout](case.x * scale)
    case.activation = RELU
    # Where everything is below √eps the output is all β, unless eps goes along.
    case.eps = 0.0 if scale < 1 else 1e-5
    assert max(v for k, v in case.errors().items() if "var" not in k and "mean" not in k) <= KERNEL
    if scale < 1:
        case.eps = 1e-5
        y = case.forward()[0]
        beta = case.bias.relu().view(1, -1, 1, 1).expand_as(y)  # type: ignore[union-attr]
        assert error(y, beta) <= KERNEL


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e3, 0.1])
def test_zero_variance_gives_beta(value: float, layout: str) -> None:
    case = draw((5, 7, 6, 6), 0.0)
    case.x = LAYOUTS[layout](torch.full_like(case.x, value))
    y, _, var, _ = case.forward()
    assert torch.equal(var, torch.zeros_like(var))
    assert torch.equal(y, case.bias.view(1, -1, 1, 1).expand_as(y))  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_stay_in_their_channel(layout: str) -> None:
    case = draw((4, 5, 8, 8), 0.0)
    case.x[1, 2, 3, 3] = float("nan")
    case.x[1, 4, 3, 3] = float("inf")
    case.x = LAYOUTS[layout](case.x)
    case.activation = RELU
    y = case.forward()[0]
    assert y[:, [0, 1, 3]].isfinite().all()
    assert y[:, 2].isnan().all()
    assert y[:, 4].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", WRITTEN)
def test_every_element_is_written(shape: tuple[int, ...], layout: str) -> None:
    """What an op returns next is laid over memory that is full of NaN."""
    case = draw(shape, 0.0)
    case.x, case.dy = LAYOUTS[layout](case.x), LAYOUTS[layout](case.dy)
    case.activation = RELU
    case.residual = torch.randn(shape).to(DEVICE)
    for value in case.run().values():
        value.fill_(float("nan") if value.is_floating_point() else 255)
    for _ in range(3):
        torch.full(shape, float("nan"), device=DEVICE)
    errors = case.errors()
    assert max(errors.values()) <= KERNEL, errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gate_of_another_shape_is_refused(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(4, 3, 5, 5, device=DEVICE))
    op = torch.ops.batchnorm
    _, mean, var, gate = op.training_forward(x, None, None, None, 1e-5, RELU)
    with pytest.raises((ValueError, RuntimeError), match="gate must be what training_forward"):
        op.training_backward(x, x, mean, var, None, None, None, gate, 1e-5, RELU)
    with pytest.raises(ValueError, match="gate must be what training_forward"):
        reference.training_backward(x, x, mean, var, None, None, None, gate, 1e-5, RELU)


def test_unknown_strides_give_a_contiguous_result() -> None:
    case = draw((3, 4, 5, 6), 0.0)
    plain = case.forward()[0]
    case.x = LAYOUTS["strided"](case.x)
    y = case.forward()[0]
    assert y.is_contiguous()
    assert torch.equal(y, plain)


@of_the_cpu
def test_a_large_output_outlives_its_input_and_is_used_again() -> None:
    case = draw((8, 64, 56, 56), 0.0)
    y = case.forward()[0]
    place, copy = y.data_ptr(), y.clone()
    view = y[1:]
    del y
    second = case.forward()[0]
    assert second.data_ptr() != place  # the view still holds it
    assert torch.equal(view, copy[1:])
    del view
    assert case.forward()[0].data_ptr() == place
    second.share_memory_()
    assert torch.equal(second, copy)


BLOCKS = """
import torch
from batchnorm import ops
from batchnorm.ops import reference

def lazily_free():
    lines = open("/proc/self/smaps").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree"))

one = torch.ones(1)
large, small = torch.randn(2, 1, 1 << 22), torch.randn(2, 1, 1 << 17)
normalize = lambda x: ops.normalize(x, one, one, None, None, None, 0.0, 0)
two = [normalize(large), normalize(large)]  # so much was once in use, and may be kept
del two
found = [lazily_free()]
for times in (1000, 100):
    for _ in range(times):
        normalize(small)
    found.append(lazily_free())
print(*found)
"""


@of_the_cpu
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not tell")
def test_a_block_is_left_to_the_system_when_nobody_asks_for_it() -> None:
    """Of two of 32 MB the first makes room for the small ones; not at once, as that is slow."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", str(32 << 10)]


@of_the_cpu
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lesser_instruction_sets(isa: str) -> None:
    """The fuzz test and the exactness table again, in a process held to another set."""
    here = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x"]
    command += [here, "-k", "fuzz or exact or extreme or streamed or instruction_set_is"]
    done = subprocess.run(
        command,
        env={**os.environ, "BATCHNORM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(here)),
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_instruction_set_is_the_one_asked_for() -> None:
    asked = os.environ.get("BATCHNORM_CPU_ISA")
    if asked and asked != "avx512":
        assert ops.kernels()["cpu"] == f"compiled ({asked})"
