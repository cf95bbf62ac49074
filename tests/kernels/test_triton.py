"""The Triton kernels: the layer's suite in the interpreter, and compiled for a GPU, without one.

What the interpreter cannot show is the meeting of programs, as it runs them one after another.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tolerances import SPILLED

from batchnorm.kernels.triton import cut
from batchnorm.kernels.triton.cut import View

pytest.importorskip("triton", reason="Triton is not installed")
HERE = Path(__file__).parent
SUITE = [
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_fuzz.py",
    "tests/kernels/test_update.py",
    "tests/kernels/interpreted.py",
    "tests/ops/test_fuzz.py",
    "tests/ops/test_schemas.py",
    "tests/ops/test_autograd.py",
    "tests/nn/test_contract.py",
]
# What the derivatives and the layers add is the same for one launch and for two.
RUNS = {
    "one launch": ({}, SUITE),
    "two launches": ({"BATCHNORM_TRITON_HELD_BYTES": "0"}, SUITE[:5]),
}


@pytest.fixture(scope="module")
def suites():
    """The suite, already running: both at once, as they take minutes."""
    interpreter = {"TRITON_INTERPRET": "1", "BATCHNORM_CPU_LIBRARY": "triton"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *suite],
            env={**os.environ, **interpreter, **environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=HERE.parents[1],
        )
        for name, (environment, suite) in RUNS.items()
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", RUNS)
def test_the_suite_in_the_interpreter(name, suites):
    output, _ = suites[name].communicate()
    assert suites[name].returncode == 0, output[-6000:]


SHAPES = {
    "planes": (256, 256, 56, 56),
    "channels last": (256, 256, 56, 56),
    "two axes": (4096, 1024),
    "odd planes, held": (32, 512, 7, 7),
    "channels last, held": (32, 256, 7, 7),
    "two axes, held": (1024, 512),
    "runs": (64, 48, 2, 2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_sm_90(name, dtype, monkeypatch, tmp_path):
    from tests.kernels import sm_90

    x = torch.empty(SHAPES[name], dtype=dtype)
    if "last" in name:
        x = x.to(memory_format=torch.channels_last)
    kernels = [
        sm_90.compiled(kernel, args, tmp_path)
        for kernel, args in sm_90.launches(monkeypatch, x, residual=True, activation=1)
    ]
    assert len(kernels) == (2 if "held" in name else 4)
    assert not [k.name for k in kernels if k.stack > SPILLED]
    for kernel in kernels:
        # Whole vectors wherever rows begin at a multiple of 16 bytes.
        wide = "cp.async.cg.shared.global [" in kernel.ptx or ".v4.b32" in kernel.ptx
        assert wide or name in ("odd planes, held", "runs")


ODD = [(1, 64, 56, 56), (4096, 1), (2, 1, 16), (8, 3, 2, 2), (2, 3, 200_000)]


@pytest.mark.parametrize("held", [0, cut.HELD_BYTES])
@pytest.mark.parametrize("shape", ODD)
def test_compiles_for_odd_shapes_and_every_activation(shape, held, monkeypatch, tmp_path):
    """What is 1 is a constant to the compiler."""
    from tests.kernels import sm_90

    monkeypatch.setattr(cut, "HELD_BYTES", held)
    number = ODD.index(shape)
    for dtype, activation in ((torch.float16, 1 + number), (torch.float64, 6 - number)):
        x = torch.empty(shape, dtype=dtype)
        found = sm_90.launches(monkeypatch, x, residual=number % 2 == 0, activation=activation)
        for kernel, args in found:
            assert sm_90.compiled(kernel, args, tmp_path).ptx


def test_the_pieces_compile(monkeypatch, tmp_path):
    from tests.kernels import sm_90

    from batchnorm.ops import triton

    x, v = torch.empty(8, 70, 4, 4), torch.empty(70, dtype=torch.float64)
    seen = sm_90.watch(monkeypatch)
    triton.moments(x)
    triton.normalize(x, v, v, None, v, x, 1e-5, 4)
    triton.backward_sums(x, x, v, v, v, v, x, None, 1e-5, 1)
    triton.backward_apply(x, x, v, v, v, v, v, v, 1e-5, 1)
    triton.backward_apply(x, x, v, v, None, None, None, None, 1e-5, 0)
    running, batches = torch.empty(70), torch.tensor(3)
    for momentum in (0.1, None):
        triton.update_running(running, running, batches, v, v, 128.0, momentum)
    assert len(seen) == 9
    for kernel, args in seen:
        assert sm_90.compiled(kernel, args, tmp_path).ptx


def test_meeting_needs_release_and_acquire(monkeypatch, tmp_path):
    from tests.kernels import sm_90

    x = torch.empty(1024, 512, dtype=torch.bfloat16)
    for kernel, args in sm_90.launches(monkeypatch, x, residual=False, activation=1):
        assert args["MEET"]
        assert args["launch_cooperative_grid"]
        ptx = sm_90.compiled(kernel, args, tmp_path).ptx
        assert "atom.global.gpu.release.add.u32" in ptx or "atom.release.gpu.global.add.u32" in ptx
        assert "acquire" in ptx


VIEWS = [
    View(planes, rows, cols, channels)
    for planes, rows, cols, channels in itertools.product(
        [True, False], [1, 3, 64, 1000], [1, 16, 49, 3136, 5000], [1, 7, 64]
    )
]


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_every_tile_belongs_to_one_part(processors):
    for view in VIEWS:
        for itemsize in (2, 4):
            cuts = [
                cut.streamed(view, itemsize, processors),
                cut.held(view, itemsize, 1, processors),
            ]
            for c in filter(None, cuts):
                down, across = -(-view.rows // c.rows), -(-view.cols // c.cols)
                tiles = down * across if view.planes else down
                each = -(-tiles // c.parts)
                shares = [range(tiles)[p * each : (p + 1) * each] for p in range(c.parts)]
                assert all(shares), (view, c)
                assert sorted(itertools.chain(*shares)) == list(range(tiles))
                blocks = view.channels if view.planes else across
                assert c.programs == blocks * c.parts


@pytest.mark.parametrize("side", [112, 56, 28, 14, 7])
def test_planes_are_padded_little(side):
    """At most a fourteenth, or what reading 128 bytes at a time asks for."""
    for itemsize in (2, 4):
        width = cut.streamed(View(True, 256, side * side, 64), itemsize, 132).cols
        padded = -(-side * side // width) * width
        least = -(-side * side // (128 // itemsize)) * (128 // itemsize)
        assert padded <= max(least, side * side * 15 / 14)


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_what_is_held_fits(processors):
    for view in VIEWS:
        for itemsize, tensors in itertools.product((2, 4, 8), (1, 2)):
            c = cut.held(view, itemsize, tensors, processors)
            if c is not None:
                assert c.rows * c.cols * itemsize * tensors <= cut.HELD_BYTES
                assert c.parts == 1 or c.programs <= processors
