"""``python -m benchmarks.least``: what no kernel of this kind goes below.

Forward and backward of contiguous tensors by torch eager, by ours and by the program of
least.cpp, which does less than has to be done. That one is taken in the best of its variants (how
many channels a group has, stores past the caches or not, the next group left, asked for or summed
meanwhile), and the layer's call on next to no data is added to it. Two threads, a processor with
AVX-512.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm import ops
from benchmarks import peers
from benchmarks.cases import SHAPES, Case, Inputs, make_inputs
from benchmarks.environment import environment
from benchmarks.measure import interleaved

TINY = "2x16"
STEP = 32  # values, as in least.cpp
LINE = 64  # bytes
GROUP_BYTES = 3 << 20  # of more, nothing stays in a core's cache until it is read again
BETWEEN = 16 << 20  # bytes that go through the caches of the cores before each call
TURNS = 3
WAYS = 3  # of least.cpp

Least = Callable[..., float]
Row = dict[str, Any]


def build(folder: str) -> Least:
    source, library = Path(__file__).with_suffix(".cpp"), Path(folder) / "least.so"
    flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
    least: Least = ctypes.CDLL(str(library)).least
    least.restype = ctypes.c_double  # type: ignore[attr-defined]
    return least


@dataclass(frozen=True)
class Variant:
    """How least.cpp goes through a tensor: groups of `length` values in each of some rows."""

    rows: int
    stride: int
    length: int
    groups: int
    stream: bool
    way: int  # of least.cpp, with the next group


def variants(case: Case) -> list[Variant]:
    samples, channels, *axes = case.size
    size = case.bytes() // case.values()
    if axes:
        row = math.prod(axes)
        widths = [2**k * row for k in range(channels.bit_length() - 1)]
        whole = [width for width in widths if width % STEP == 0]
        fit = [width for width in whole if width * samples * size <= GROUP_BYTES] or whole[:1]
        cuts = [(samples, channels * row, width, channels * row // width) for width in fit]
    else:
        # Rows as they come, half for each thread: a column is not read again before all of it was.
        cuts = [(1, 0, case.values() // 2, 2)]
    return [
        Variant(*cut, stream, way)
        for cut in cuts
        for stream, way in product((False, True), range(WAYS))
        if not stream or cut[1] * size % LINE == cut[2] * size % LINE == 0
    ]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def least_seconds(least: Least, case: Case, inputs: Inputs, between: Tensor) -> float:
    one = torch.ones(case.size[1])
    # Where our outputs lie: large ones on huge pages.
    outputs = [ops.normalize(inputs.x, one, one, None, None, None, 0.0, 0) for _ in range(3)]
    tensors = [pointer(t) for t in (inputs.x, inputs.residual, inputs.dy, *outputs)]
    narrow, add = case.type == "bfloat16", case.kind == "add_relu"
    calls = 6 if case.values() > 1 << 22 else 30
    rest = (pointer(between), ctypes.c_int64(between.numel()), calls)
    times = []
    for v in variants(case):
        sizes = map(ctypes.c_int64, (v.rows, v.stride, v.length, v.groups))
        how = map(int, (narrow, add, v.stream, v.way))
        times.append(least(*tensors, *sizes, *how, *rest))
    if min(times) < 0:
        raise SystemExit("this processor has no AVX512_BF16: choose --only float32")
    return min(times)


def measure(least: Least, case: Case, seconds: float) -> Row:
    inputs = make_inputs(case)
    tiny = replace(case, shape=TINY)
    tiny_inputs = make_inputs(tiny)
    call = {"call": peers.call(tiny, tiny_inputs, peers.ours(tiny))}
    both = {
        "ours": peers.call(case, inputs, peers.ours(case)),
        "eager": peers.call(case, inputs, peers.eager(case)),
    }
    between = torch.zeros(BETWEEN, dtype=torch.uint8)
    best = dict.fromkeys(("call", "ours", "eager", "least"), math.inf)
    for _ in range(TURNS):
        for name, times in {
            **interleaved(call, seconds / 10),
            **interleaved(both, seconds),
            "least": [least_seconds(least, case, inputs, between)],
        }.items():
            best[name] = min(best[name], *times)
    bound = best["least"] + best["call"]
    return {
        "case": case.name,
        "type": case.type,
        "kind": case.kind,
        **best,
        "ratio": best["eager"] / best["ours"],
        "bound": best["eager"] / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.least", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression of case names")
    parser.add_argument("--seconds", type=float, default=0.15, help="per case, three times")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if "avx512" not in ops.kernels()["cpu"]:
        raise SystemExit(f"least.cpp needs AVX-512, and the kernels are {ops.kernels()['cpu']}")
    rows = []
    print("| case | ours ms | least ms | call ms | eager over ours | eager over least and call |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        least = build(folder)
        for kind, type_, shape in product(("relu", "add_relu"), ("float32", "bfloat16"), SHAPES):
            case = Case(shape, "contiguous", type_, kind, "forward_backward")
            if not re.search(args.only, case.name):
                continue
            row = measure(least, case, args.seconds)
            rows.append(row)
            times = " | ".join(f"{1e3 * row[name]:.3f}" for name in ("ours", "least", "call"))
            print(
                f"| {case.name} | {times} | {row['ratio']:.2f} | {row['bound']:.2f} |", flush=True
            )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["type"], row["kind"]), []).append(row)
    print("\n| type | kind | eager over ours | eager over least and call |\n|---|---|---|---|")
    for key, group in groups.items():
        means = [
            statistics.geometric_mean([float(r[m]) for r in group]) for m in ("ratio", "bound")
        ]
        print(f"| {' | '.join(key)} | {means[0]:.2f} | {means[1]:.2f} |")
    args.out.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment("cpu"), "rows": rows}
    (args.out / "least.json").write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(2)  # as many as least.cpp has
    main()
