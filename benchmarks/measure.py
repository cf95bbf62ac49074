"""Times, agreement and the rate that memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Time the calls in turn, so that what disturbs the machine disturbs all of them alike.

    Every second turn goes backwards, or a peer's threads that still wait would disturb always the
    same one.
    With one thread the time is the processor's, which does not count other processes' turns.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order = list(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name in order:
            start = clock()
            result = calls[name]()
            times[name].append(clock() - start)
            del result
        order.reverse()
    return times


def spread(times: list[float]) -> float:
    """The distance between the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def as_tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return (value.to_dense() if value.layout is not torch.strided else value).double()
    return torch.from_numpy(np.asarray(value).astype("float64"))


def disagreement(got: tuple[object, ...], want: tuple[object, ...]) -> float:
    """The largest root mean square difference of two lists of results, over that of the second.

    A mean, not a maximum: in 16 bits a value near the kink of ReLU may fall on either side.
    """
    worst = 0.0
    for a, b in zip(map(as_tensor, got), map(as_tensor, want), strict=True):
        scale = b.square().mean().sqrt().clamp(min=1e-30)
        worst = max(worst, float((a - b).square().mean().sqrt() / scale))
    return worst


def streaming_rate(size: int) -> float:
    """Bytes per second that reading, or reading and writing, tensors of so many bytes reaches."""
    x, y = torch.ones(size // 4), torch.empty(size // 4)
    best = interleaved({"copy": lambda: y.copy_(x), "sum": lambda: x.sum()}, 0.3)
    return max(2 * size / min(best["copy"]), size / min(best["sum"]))


def llc_bytes() -> int:
    """The size of the last-level cache, 0 where the system does not say."""
    # sysconf adds up the caches of sockets that a virtual machine does not have.
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=0)
