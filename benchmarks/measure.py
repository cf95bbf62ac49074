"""Times, agreement and the rate that memory allows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from batchnorm import ops
from benchmarks.cases import Case
from benchmarks.peers import Call

# What is launched ahead on a GPU is timed by so many calls, and the wait for the first is lost
# among them.
CALLS = 20
# Root mean square, of values of any scale. Ours against float64: roundings of the type.
EXACT = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# A peer against ours: torch's own channels_last sums are 5e-3 off in float32, and what is rounded
# to bfloat16 before ReLU falls on the other side of its kink once in a thousand; to float16, one
# eighth as often, which is a third in the root of the square.
AGREEMENT = {"float32": 2e-2, "float16": 4e-2, "bfloat16": 1e-1}


def host_seconds(call: Callable[[], object]) -> float:
    """With one thread the time is the processor's, which does not count other processes' turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = call()
    elapsed = clock() - start
    del result
    return elapsed


def device_seconds(call: Callable[[], object]) -> float:
    """The GPU's time from the first launch to the end of the last, waits for the host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


TIMERS = {"cpu": host_seconds, "cuda": device_seconds}


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    timed: Callable[[Callable[[], object]], float] = host_seconds,
) -> dict[str, list[float]]:
    """Time the calls in turn, so that what disturbs the machine disturbs all of them alike.

    Every second turn goes backwards, or a peer's threads that still wait would disturb always the
    same one.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order = list(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name in order:
            times[name].append(timed(calls[name]))
        order.reverse()
    return times


def spread(times: list[float]) -> float:
    """The distance between the quartiles over the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def median_ratio(times: list[float], others: list[float]) -> tuple[float, float, float]:
    """The median of the ratios turn by turn, and the interval that holds it in 19 of 20 cases.

    (With fewer than six turns it is all that was seen, and holds it less often.)

    Turn by turn, as what slows the machine for seconds then slows both. The interval is that of the
    sign test: between order statistics, whatever the distribution.
    """
    ratios = sorted(a / b for a, b in zip(times, others, strict=True))
    n = len(ratios)
    # P(a binomial of n and 1/2 is below k) is at most 1/40.
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= 1 / 40:
        k += 1
    return statistics.median(ratios), ratios[max(k - 1, 0)], ratios[min(n - k, n - 1)]


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


def errors(
    case: Case, calls: Mapping[str, Call], exact: Callable[[], tuple[Tensor, ...]]
) -> dict[str, float]:
    """How far ours is from float64, and each other from ours: too far stops the run."""
    results = calls["ours"]()
    found = {"ours": disagreement(results, exact())}
    for name, call in calls.items():
        if name != "ours":
            found[name] = disagreement(call(), results)
    for name, error in found.items():
        if not error <= (EXACT if name == "ours" else AGREEMENT)[case.type]:
            raise SystemExit(f"{case.name}: {name} is off by {error:.1e}; no report")
    return found


@dataclass(frozen=True)
class Rates:
    """Bytes per second that memory, or the cache that holds the tensors, reaches."""

    read: float
    copy: float
    """Read and written ones together."""

    def seconds(self, moved: int, written: int) -> float:
        """The least time for so many bytes, as many of them copied as are written."""
        return 2 * written / self.copy + (moved - 2 * written) / self.read


def streaming_rates(size: int, tensors: int) -> Rates:
    """Measure the rates over as many tensors of so many bytes as a case has.

    Over fewer of them the cache nearest to the processor would answer, which holds one tensor and
    not all. Copies are torch's and our inference, whichever is faster.
    """
    full = [torch.ones(1, 1, size // 4) for _ in range(tensors)]
    pairs = list(zip(full[::2], full[1::2], strict=False))
    one = torch.ones(1)

    def read() -> None:
        for x in full:
            x.sum()

    def copy() -> None:
        for x, y in pairs:
            y.copy_(x)

    def normalise() -> list[Tensor]:
        # Kept to the end, so that each goes to a place of its own.
        return [ops.normalize(x, one, one, None, None, None, 0.0, 0) for x, _ in pairs]

    best = {
        name: min(times)
        for name, times in interleaved(
            {"read": read, "copy": copy, "normalise": normalise}, 0.3
        ).items()
    }
    copied = 2 * size * len(pairs) / min(best["copy"], best["normalise"])
    return Rates(tensors * size / best["read"], copied)


def copy_rate(size: int, device: str) -> float:
    """Bytes read and written per second by copying a tensor of so many bytes."""
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)

    def copies() -> None:
        for _ in range(CALLS):
            y.copy_(x)

    times = interleaved({"copy": copies}, 0.5, TIMERS[device])["copy"]
    return CALLS * 2 * size / statistics.median(times)


def llc_bytes() -> int:
    """The size of the last-level cache, 0 where the system does not say."""
    # sysconf adds up the caches of sockets that a virtual machine does not have.
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=0)
