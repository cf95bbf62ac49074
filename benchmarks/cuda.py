"""``python -m benchmarks.cuda``: the layer, a ResNet-50 step and exactness on a GPU.

Each time is the median of rounds, a round being 20 calls one after another (or one for each set of
inputs, if there are more): what a training loop would see, which is the host's time where launching
takes longer than the work. Inputs take turns, so many that the L2 cache does not hold them. What
would fit there is timed as a CUDA graph, too, without the host. A case whose results disagree
stops the run: nothing more is reported.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from statistics import geometric_mean, median

import torch

from batchnorm import ops
from benchmarks import exactness, peers, resnet50
from benchmarks.cases import GPU_FORMATS, GPU_SHAPES, Case, cases, make_inputs
from benchmarks.environment import environment
from benchmarks.measure import CALLS, TIMERS, copy_rate, errors, interleaved, spread

Peers = Mapping[str, Callable[[Case], peers.Normalise]]
Round = Callable[[], object]
Row = dict[str, object]

PEERS: Peers = {
    "eager": peers.eager,
    "compile": peers.compiled,
}
# What the summary holds the results against: the share of the copy's rate that is reached beyond
# the cache, and the ratio to each peer, forward and backward with ReLU.
SHARE = 0.9
RATIO = {"eager": 1.5, "compile": 1.15}
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Where the layers run, how fast it copies, and how a round becomes a graph."""

    device: str
    bytes_per_second: float
    cache_bytes: int
    capture: Callable[[Round], Round]


def captured(run: Round) -> Round:
    """The launches of a round as a graph, whose replay asks nothing of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at a first call cannot be captured
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def in_turn(calls: list[peers.Call], count: int) -> Round:
    def run() -> None:
        for call in islice(cycle(calls), count):
            call()

    return run


def timings(rounds: Mapping[str, Round], count: int, seconds: float, device: str) -> Row:
    times = interleaved(rounds, seconds * len(rounds), TIMERS[device])
    middle = {name: median(t) / count for name, t in times.items()}
    return {
        "milliseconds": {name: 1e3 * t for name, t in middle.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "ratio": {name: t / middle["ours"] for name, t in middle.items() if name != "ours"},
        "rounds": len(times["ours"]),
    }


def measure(case: Case, among: Peers, seconds: float, machine: Machine) -> Row:
    size, cache = case.bytes(), machine.cache_bytes
    sets = [make_inputs(case, machine.device, seed) for seed in range(ceil(2 * cache / size))]
    calls = {}
    for name, make in {"ours": peers.ours, **among}.items():
        normalise = make(case)
        calls[name] = [peers.call(case, inputs, normalise) for inputs in sets]
    error = errors(
        case,
        {name: each[0] for name, each in calls.items()},
        lambda: peers.exact(case, sets[0]),
    )
    count = max(CALLS, len(sets))
    rounds = {name: in_turn(each, count) for name, each in calls.items()}
    times = timings(rounds, count, seconds, machine.device)
    moved = case.moved_bytes(held=False)
    row = {
        "case": case.name,
        **vars(case),
        "bytes": size,
        "moved_bytes": moved,
        "beyond_cache": size > cache,
        "input_sets": len(sets),
        "error": error,
        **times,
        "copy_share": moved / machine.bytes_per_second / (1e-3 * times["milliseconds"]["ours"]),
    }
    if size <= cache:
        row["graph"] = graphs(rounds, count, seconds, machine)
    return row


def graphs(rounds: Mapping[str, Round], count: int, seconds: float, machine: Machine) -> Row:
    """The times of the rounds that can be captured, and why the others cannot."""
    replays, refused = {}, {}
    for name, run in rounds.items():
        try:
            replays[name] = machine.capture(run)
        except RuntimeError as refusal:
            if name == "ours":
                raise
            refused[name] = str(refusal)
    return {**timings(replays, count, seconds, machine.device), "refused": refused}


def table(rows: list[Row]) -> str:
    names = list(rows[0]["ratio"])
    head = ["shape", "layout", "type", "kind", "mode", "ours ms", "±", *names, "of copy"]
    head += ["ours ms, graph", *(f"{name}, graph" for name in names)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row[key] for key in ("shape", "layout", "type", "kind", "mode")]
        cells += [f"{row['milliseconds']['ours']:.4f}", f"{row['spread']['ours']:.0%}"]
        cells += [f"{row['ratio'][name]:.2f}×" for name in names]
        cells.append(f"{row['copy_share']:.0%}")
        if "graph" in row:
            ratio = row["graph"]["ratio"]
            cells.append(f"{row['graph']['milliseconds']['ours']:.4f}")
            cells += [f"{ratio[name]:.2f}×" if name in ratio else "" for name in names]
        else:
            cells += [""] * (1 + len(names))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def means(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, float]]:
    """The geometric mean over the shapes of the ratio to each peer."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = tuple(row[k] for k in ("mode", "kind", "type", "layout"))
        for name, ratio in row["ratio"].items():
            groups[key][name].append(ratio)
        for name, ratio in row.get("graph", {}).get("ratio", {}).items():
            groups[key][f"{name}, graph"].append(ratio)
    return {
        key: {name: geometric_mean(ratios) for name, ratios in by_peer.items()}
        for key, by_peer in groups.items()
    }


def targets(rows: list[Row]) -> list[tuple[str, float, float]]:
    """What was aimed at, what was reached, and what it should be at the least."""
    found = []
    beyond = [row for row in rows if row["beyond_cache"]]
    if beyond:
        least = min(beyond, key=lambda row: row["copy_share"])
        found.append(
            (f"least share of the copy's rate, {least['case']}", least["copy_share"], SHARE)
        )
    for kind in ("relu", "add_relu"):
        trained = [r for r in rows if (r["mode"], r["kind"]) == ("forward_backward", kind)]
        for name, bound in RATIO.items():
            ratios = [row["ratio"][name] for row in trained if name in row["ratio"]]
            if ratios:
                what = f"over {name}, forward_backward {kind}, geometric mean"
                found.append((what, geometric_mean(ratios), bound))
    return found


def summary(rows: list[Row]) -> str:
    by_group = means(rows)
    names = sorted({name for group in by_group.values() for name in group})
    lines = [
        f"| mode | kind | type | layout | {' | '.join(names)} |",
        "|" + "---|" * (4 + len(names)),
    ]
    for key, group in sorted(by_group.items()):
        cells = [f"{group[name]:.2f}×" if name in group else "" for name in names]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    lines.append("")
    for what, value, bound in targets(rows):
        verdict = "hold" if value >= bound else "miss"
        lines.append(f"- {what}: {value:.2f}, at least {bound}: {verdict}")
    return "\n".join(lines)


def write(rows: list[Row], place: dict[str, object], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": place, "rows": rows}, indent=1)
    (out / "layers.json").write_text(text)
    (out / "layers.md").write_text(f"{place}\n\n{summary(rows)}\n\n{table(rows)}\n")


def layers(
    chosen: Iterable[Case], among: Peers, seconds: float, machine: Machine, out: Path
) -> None:
    place = {
        **environment(machine.device),
        "copy_bytes_per_second": machine.bytes_per_second,
        "cache_bytes": machine.cache_bytes,
    }
    print(place)
    rows: list[Row] = []
    for case in chosen:
        rows.append(measure(case, among, seconds, machine))
        lines = table(rows[-1:]).splitlines()
        print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)
        write(rows, place, out)  # each time: a run that is cut off leaves what it has
    print(summary(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parts = ("exactness", "step", "layers")
    parser.add_argument(
        "--parts", nargs="+", choices=parts, default=parts, help="all, unless named"
    )
    parser.add_argument("--only", default="", help="a regular expression of the layers' cases")
    parser.add_argument("--seconds", type=float, default=0.1, help="per case and peer")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="all, unless named"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cuda"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU")
    if not ops.kernels()["cuda"].startswith("triton"):
        raise SystemExit(f"the kernels are not in use: {ops.kernels()['cuda']}")
    if "exactness" in args.parts:
        exactness.report("cuda", args.out)
    if "step" in args.parts:
        torch.backends.cudnn.benchmark = True  # as people train: convolutions chosen by trying
        resnet50.report("cuda", batch=256, size=224, seconds=20, out=args.out)
    if "layers" in args.parts:
        layers(
            (case for case in cases(GPU_SHAPES, GPU_FORMATS) if re.search(args.only, case.name)),
            {name: PEERS[name] for name in args.peers},
            args.seconds,
            Machine(
                "cuda",
                copy_rate(COPIED_BYTES, "cuda"),
                torch.cuda.get_device_properties("cuda").L2_cache_size,
                captured,
            ),
            args.out,
        )


if __name__ == "__main__":
    main()
