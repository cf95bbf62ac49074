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
    *(
        "tests/kernels/test_kernels.py",
        "tests/kernels/test_fuzz.py",
        "tests/kernels/test_update.py",
    ),
    "tests/kernels/interpreted.py",
    *("tests/ops/test_fuzz.py", "tests/ops/test_schemas.py", "tests/ops/test_autograd.py"),
    "tests/nn/test_contract.py",
]


@pytest.mark.parametrize("held", [None, 0], ids=["one launch", "two launches"])
def test_the_suite_in_the_interpreter(held):
    """With no byte held on the chip, all ops take the two launches."""
    environment = {"TRITON_INTERPRET": "1", "BATCHNORM_CPU_LIBRARY": "triton"}
    suite = SUITE
    if held is not None:
        environment["BATCHNORM_TRITON_HELD_BYTES"] = str(held)
        suite = SUITE[:5]  # what the derivatives and the layers add is the same for both
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *suite],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
    assert not [k.name for k in kernels if k.spilled > SPILLED]
    for kernel in kernels:
        # Whole vectors wherever rows begin at a multiple of 16 bytes.
        wide = "cp.async.cg.shared.global [" in kernel.ptx or ".v4.b32" in kernel.ptx
        assert wide or name in ("odd planes, held", "runs")


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
            cuts = [cut.streamed(view, processors), cut.held(view, itemsize, 1, processors)]
            for c in filter(None, cuts):
                down, across = -(-view.rows // c.rows), -(-view.cols // c.cols)
                tiles = down * across if view.planes else down
                each = -(-tiles // c.parts)
                shares = [range(tiles)[p * each : (p + 1) * each] for p in range(c.parts)]
                assert all(shares), (view, c)
                assert sorted(itertools.chain(*shares)) == list(range(tiles))
                blocks = view.channels if view.planes else across
                assert c.programs == blocks * c.parts


@pytest.mark.parametrize("processors", [1, 4, 132])
def test_what_is_held_fits(processors):
    for view in VIEWS:
        for itemsize, tensors in itertools.product((2, 4, 8), (1, 2)):
            c = cut.held(view, itemsize, tensors, processors)
            if c is not None:
                assert c.rows * c.cols * itemsize * tensors <= cut.HELD_BYTES
                assert c.parts == 1 or c.programs <= processors
