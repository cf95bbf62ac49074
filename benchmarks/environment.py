"""Where a measurement was made."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from batchnorm import __version__, ops


def environment(device: str) -> dict[str, object]:
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
        "kernels": ops.kernels()[device],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": model,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "pages": "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "ordinary",
        **(gpu() if device == "cuda" else {}),
    }


def gpu() -> dict[str, object]:
    import triton

    properties = torch.cuda.get_device_properties("cuda")
    driver = Path("/proc/driver/nvidia/version")
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "not shown here",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }
