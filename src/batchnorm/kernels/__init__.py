"""Compiled implementations of the ops, and why one is missing."""

import ctypes
import os
import platform
from importlib.resources import as_file, files
from pathlib import Path

import torch

__all__ = ["load_cpu"]


def load_cpu() -> str:
    """Load the CPU kernels and say which instruction set they use.

    Raises:
        ImportError: There are none; the message says why.
    """
    suffix = "so" if platform.system() == "Linux" else "dylib"
    built = files(__name__)
    # Another build, for instance one under sanitizers.
    other = os.environ.get("BATCHNORM_CPU_LIBRARY")
    library = Path(other) if other else built.joinpath(f"libbatchnorm_cpu.{suffix}")
    if other and not library.is_file():
        raise ImportError(f"BATCHNORM_CPU_LIBRARY={other!r} is not a file")
    if not library.is_file():
        reason = built.joinpath("without_kernels.txt")
        raise ImportError(reason.read_text() if reason.is_file() else "they were not built")
    with as_file(library) as path:
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise ImportError(f"they do not load: {error}") from error
        name = ctypes.CDLL(str(path)).batchnorm_cpu_instruction_set
    name.restype = ctypes.c_char_p
    return str(name().decode())
