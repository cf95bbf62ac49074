"""Which implementation of the ops is in use."""

import torch

from batchnorm.ops.schemas import NAMESPACE

__all__ = ["kernels"]


def kernels() -> dict[str, str]:
    """Say for each kind of device whether compiled kernels or the reference serve the ops."""
    op = f"{NAMESPACE}::training_forward"
    return {
        key.lower(): "compiled"
        if torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
        else "reference"
        for key in ("CPU", "CUDA")
    }
