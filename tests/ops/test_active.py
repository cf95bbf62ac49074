"""Which kernels serve the ops, and what is said where they cannot."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from batchnorm.ops import active


def test_a_missing_triton_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"not installed: pip install 'triton>=3.6'"):
        active._load_triton("CUDA")


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.5.1")
    with pytest.raises(ImportError, match=r"Triton 3.5.1 is too old: pip install 'triton>=3.6'"):
        active._load_triton("CUDA")


@pytest.mark.parametrize(
    ("library", "said"),
    [
        ("triton", "reference (BATCHNORM_CPU_LIBRARY=triton needs TRITON_INTERPRET=1)"),
        ("/none.so", "reference (BATCHNORM_CPU_LIBRARY='/none.so' is not a file)"),
    ],
)
def test_without_kernels_the_layer_works_and_says_so(library, said):
    code = (
        "import torch, batchnorm.ops as o; print(o.kernels()['cpu']);"
        "print(o.moments(torch.ones(4, 3))[0].tolist())"
    )
    environment = {**os.environ, "BATCHNORM_CPU_LIBRARY": library, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [said, "[1.0, 1.0, 1.0]"]
