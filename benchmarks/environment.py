"""Where a measurement was made."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from batchnorm import __version__, ops


def environment() -> dict[str, object]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter(()),
        platform.processor(),
    )
    return {
        "batchnorm": __version__,
        "kernels": ops.kernels()["cpu"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": model,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "pages": "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "ordinary",
    }
