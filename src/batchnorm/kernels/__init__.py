"""Compiled implementations of the ops, and why one is missing."""

import ctypes
import importlib
import os
import platform
from importlib.resources import as_file, files
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["load_autograd", "load_cpu"]


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


def load_autograd() -> ModuleType:
    """Load the calls that need no Python between their caller and the dispatcher.

    Raises:
        ImportError: There are none for this torch and this Python; the message says why.
    """
    if os.environ.get("BATCHNORM_AUTOGRAD") == "python":
        raise ImportError("BATCHNORM_AUTOGRAD=python")
    built = files(__name__)
    reason = built.joinpath("without_autograd.txt")
    if not reason.is_file():
        raise ImportError("they were not built")
    if why := reason.read_text():
        raise ImportError(why)
    # Of another version it may load and crash later, so that this comes first.
    torch_of_build = built.joinpath("autograd_torch.txt").read_text()
    if torch_of_build != str(torch.__version__):
        raise ImportError(f"built for torch {torch_of_build}, this is {torch.__version__}")
    try:
        return importlib.import_module(f"{__name__}._autograd")
    except ModuleNotFoundError as error:
        raise ImportError("built for another Python") from error
