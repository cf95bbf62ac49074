"""Which implementation of the ops is in use, and why not a compiled one."""

import torch

from batchnorm.kernels import load_cpu
from batchnorm.ops.schemas import NAMESPACE

__all__ = ["kernels"]


def _load() -> str:
    try:
        return f"compiled ({load_cpu()})"
    except ImportError as missing:
        return f"reference ({missing})"


_cpu = _load()


def kernels() -> dict[str, str]:
    """Say for each kind of device whether compiled kernels or the reference serve the ops.

    >>> sorted(kernels())
    ['cpu', 'cuda']
    """
    op = f"{NAMESPACE}::training_forward"
    cuda = torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    return {"cpu": _cpu, "cuda": "compiled" if cuda else "reference"}
