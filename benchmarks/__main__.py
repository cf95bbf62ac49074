"""``python -m benchmarks``: the table of the layer's speed.

Each case is measured once per page size in a process of its own. A case whose results disagree
stops the run: nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from batchnorm import ops
from benchmarks import peers
from benchmarks.cases import FEW, FORMATS, SHAPES, Case, cases, make_inputs
from benchmarks.environment import environment
from benchmarks.measure import Rates, errors, interleaved, llc_bytes, spread, streaming_rates

Row = dict[str, object]


# What a call costs that has next to nothing to normalise.
TINY = "2x16"


@dataclass
class Bounds:
    """What is measured once for several cases and bounds them."""

    rates: dict[tuple[int, int], Rates] = field(default_factory=dict)
    calls: dict[Case, float] = field(default_factory=dict)
    arithmetic: dict[Case, float] = field(default_factory=dict)
    """Seconds per value."""

    def byte_seconds(self, case: Case) -> float:
        """What moving the bytes takes at the memory's rates."""
        key = case.bytes(), case.tensors()
        if key not in self.rates:
            self.rates[key] = streaming_rates(*key)
        # A contiguous channel fits in cache between its two visits.
        moved = case.moved_bytes(held=case.layout == "contiguous")
        return self.rates[key].seconds(moved, case.written_bytes())

    def call_seconds(self, case: Case) -> float:
        tiny = replace(case, shape=TINY, layout="contiguous")
        if tiny not in self.calls:
            call = peers.call(tiny, make_inputs(tiny), peers.ours(tiny))
            self.calls[tiny] = min(interleaved({"ours": call}, 0.1)["ours"])
        return self.calls[tiny]

    def arithmetic_seconds(self, case: Case) -> float:
        """What our kernels take for so many values in a core's cache, shared by the threads."""
        part, tiny = case.in_cache(), replace(case, shape=TINY, layout="contiguous")
        threads = torch.get_num_threads()
        if part not in self.arithmetic:
            calls = {c.shape: peers.operations(c, make_inputs(c)) for c in (part, tiny)}
            torch.set_num_threads(1)
            try:
                best = {shape: min(t) for shape, t in interleaved(calls, 0.1).items()}
            finally:
                torch.set_num_threads(threads)
            self.arithmetic[part] = (best[part.shape] - best[TINY]) / part.values()
        return self.arithmetic[part] * case.values() / threads


def measure(case: Case, seconds: float, bounds: Bounds, among: list[str]) -> Row:
    inputs = make_inputs(case)
    calls = {"ours": peers.call(case, inputs, peers.ours(case))}
    for name in among:
        if name in peers.SLOW_TO_START and case.shape not in FEW:
            continue
        call = peers.PEERS[name](case, inputs)
        if call is not None:
            calls[name] = call
    error = errors(case, calls, lambda: peers.exact(case, inputs))
    times = interleaved(calls, seconds * len(calls))
    size = case.bytes()
    moving, reckoning = bounds.byte_seconds(case), bounds.arithmetic_seconds(case)
    calling = bounds.call_seconds(case)
    best = {name: min(t) for name, t in times.items()}
    fastest = min(t for name, t in best.items() if name != "ours")
    return {
        "case": case.name,
        **vars(case),
        "bytes": size,
        "beyond_cache": size > llc_bytes() > 0,
        "milliseconds": {name: 1e3 * t for name, t in best.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "ratio": {name: t / best["ours"] for name, t in best.items() if name != "ours"},
        "error": error,
        "seconds": {"bytes": moving, "arithmetic": reckoning, "call": calling},
        "floor_share": moving / best["ours"],
        # What our kernels would reach if bytes moved while they reckon, and if they never did.
        "overlapped": fastest / (calling + max(moving, reckoning)),
        "in_turn": fastest / (calling + moving + reckoning),
        "calls": len(times["ours"]),
    }


def table(rows: list[Row]) -> str:
    lines = [
        "| shape | layout | type | kind | mode | ours ms | ± | "
        + " | ".join(peers.PEERS)
        + " | floor |",
        "|" + "---|" * (8 + len(peers.PEERS)),
    ]
    for row in rows:
        ratio = row["ratio"]
        cells = [f"{ratio[p]:.2f}×" if p in ratio else "" for p in peers.PEERS]
        lines.append(
            f"| {row['shape']} | {row['layout']} | {row['type']} | {row['kind']} | {row['mode']} "
            f"| {row['milliseconds']['ours']:.3f} | {row['spread']['ours']:.0%} | "
            + " | ".join(cells)
            + f" | {row['floor_share']:.0%} |"
        )
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Geometric mean and minimum of the ratio to the fastest peer of each case, and its bounds'."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["mode"], row["kind"], row["type"], row["layout"]].append(row)
    lines = [
        "| mode | kind | type | layout | mean | least | at | mean if overlapped | if in turn |",
        "|" + "---|" * 9,
    ]
    for key, group in sorted(groups.items()):
        ratios = [min(row["ratio"].values()) for row in group]
        least, at = min(zip(ratios, (row["shape"] for row in group), strict=True))
        means = [
            statistics.geometric_mean(values)
            for values in (ratios, *([row[b] for row in group] for b in ("overlapped", "in_turn")))
        ]
        lines.append(
            f"| {' | '.join(key)} | {means[0]:.2f}× | {least:.2f}× | {at} "
            f"| {means[1]:.2f}× | {means[2]:.2f}× |"
        )
    return "\n".join(lines)


def one_process(args: argparse.Namespace) -> None:
    if not ops.kernels()["cpu"].startswith("compiled"):
        raise SystemExit(f"the kernels are not in use: {ops.kernels()['cpu']}")
    rows, bounds = [], Bounds()
    for case in cases(SHAPES, FORMATS):
        if re.search(args.only, case.name):
            rows.append(measure(case, args.seconds, bounds, args.peers))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    place = environment("cpu")
    (args.out / f"{place['pages']}.json").write_text(
        json.dumps({"environment": place, "rows": rows}, indent=1)
    )
    text = f"{place}\n\n{summary(rows)}\n\n{table(rows)}\n"
    (args.out / f"{place['pages']}.md").write_text(text)
    print(summary(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression of case names")
    parser.add_argument("--seconds", type=float, default=0.15, help="per case and peer")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=peers.PEERS,
        default=list(peers.PEERS),
        help="all, unless named",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--threads", type=int, help="1: in processor time, for a shared machine")
    parser.add_argument("--pages", choices=("ordinary", "huge", "both"), default="both")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.pages != "both":
        # torch reads this once, at its first allocation: see environment.py.
        if args.pages == "huge" and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
            raise SystemExit("set THP_MEM_ALLOC_ENABLE=1, or use --pages both")
        one_process(args)
        return
    for pages in ("ordinary", "huge"):
        flag = {"THP_MEM_ALLOC_ENABLE": "1"} if pages == "huge" else {}
        again = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--pages", pages]
        subprocess.run(again, check=True, env={**os.environ, **flag})


if __name__ == "__main__":
    main()
