"""Which implementation of the ops is in use, and why not another one."""

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch

from batchnorm.kernels import load_autograd, load_cpu
from batchnorm.ops.schemas import NAMES, library

__all__ = ["compiled_calls", "kernels"]

LEAST_TRITON = (3, 6)
# As released, and as torch's nightly builds bring it.
DISTRIBUTIONS = ("triton", "pytorch-triton")


def _version_of_triton() -> str | None:
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _by_triton(name: str) -> Callable[..., Any]:
    def op(*args: Any) -> Any:
        from batchnorm.ops import triton  # at the first call: importing Triton takes a while

        return triton.OPS[name](*args)

    return op


def _load_triton(key: str) -> str:
    """Serve a dispatch key by Triton.

    Raises:
        ImportError: Triton is missing or too old.
    """
    least = ".".join(map(str, LEAST_TRITON))
    version = _version_of_triton()
    if version is None:
        raise ImportError(f"Triton is not installed: pip install 'triton>={least}'")
    if tuple(map(int, version.split(".")[:2])) < LEAST_TRITON:
        raise ImportError(f"Triton {version} is too old: pip install 'triton>={least}'")
    for name in NAMES:
        library.impl(name, _by_triton(name), key)
    return f"triton {version}"


def _load_cpu() -> str:
    if os.environ.get("BATCHNORM_CPU_LIBRARY") != "triton":
        return f"compiled ({load_cpu()})"
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("BATCHNORM_CPU_LIBRARY=triton needs TRITON_INTERPRET=1")
    return f"{_load_triton('CPU')}, interpreted"


def _load_cuda() -> str:
    if not torch.backends.cuda.is_built():
        raise ImportError("this torch has no CUDA")
    return _load_triton("CUDA")


def _served(load: Callable[[], str]) -> str:
    try:
        return load()
    except ImportError as missing:
        return f"reference ({missing})"


try:
    compiled_calls: Any = load_autograd()
    _autograd = f"compiled (torch {torch.__version__})"
except ImportError as missing:
    compiled_calls, _autograd = None, f"Python ({missing})"

_kernels = {"cpu": _served(_load_cpu), "cuda": _served(_load_cuda), "autograd": _autograd}


def kernels() -> dict[str, str]:
    """Say for each kind of device which kernels serve the ops, or why the reference does.

    And whether what autograd does at a plain call is compiled too, or why Python does it.

    >>> sorted(kernels())
    ['autograd', 'cpu', 'cuda']
    """
    return dict(_kernels)
