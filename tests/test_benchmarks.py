"""The benchmarks run, refuse what is wrong and count right; their times are not tested."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import __main__ as processor
from benchmarks import cuda, exactness, least, measure, peers, resnet, resnet50
from benchmarks.cases import (
    GPU_FORMATS,
    GPU_SHAPES,
    KINDS,
    MODES,
    SHAPES,
    Case,
    cases,
    make_inputs,
)
from benchmarks.resnet import Torch, ours
from torch import Tensor, nn

from batchnorm import ops

SMALL, LARGE = "4x8x6x6", "16x8x16x16"  # within and beyond the cache of MACHINE, of 8 kB


def no_graph(run: Callable[[], object]) -> Callable[[], object]:
    return run


MACHINE = cuda.Machine("cpu", 1e9, 1 << 13, no_graph)
FAST = 1e-3  # seconds: as few rounds as there may be


def wrong_forward(case: Case) -> peers.Normalise:
    right = peers.eager(case)
    return lambda *given: right(*given) * 1.5


def wrong_backward(case: Case) -> peers.Normalise:
    """Right values, but the gradient does not pass through the statistics."""

    def normalise(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        var, mean = torch.var_mean(x.detach().float(), (0, 2, 3), correction=0)
        return F.batch_norm(x, mean, var, weight, bias)

    return normalise


def test_the_bytes_are_those_of_the_published_bounds() -> None:
    """Microseconds at 4.3 TB/s, calculated apart for 411 MB of bfloat16."""
    shape, layout, type_name = "256x256x56x56", "channels_last", "bfloat16"
    published = {
        ("relu", "forward"): 287,
        ("relu", "forward_backward"): 287 + 478,
        ("add_relu", "forward"): 382,
        ("add_relu", "forward_backward"): 382 + 573,
    }
    for (kind, mode), microseconds in published.items():
        moved = Case(shape, layout, type_name, kind, mode).moved_bytes(held=False)
        assert moved / 4.3e6 == pytest.approx(microseconds, abs=1)  # each number is rounded


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_the_tensors_that_each_pass_reads_and_writes(kind: str) -> None:
    added = ["residual"] if kind == "add_relu" else []
    forward = ["x", *added, "y"]
    # With a residual, the first pass of backward leaves dz for the second.
    first, second = ["x", "dy", *(["dz"] if added else [])], ["x", "dz" if added else "dy", "dx"]
    both = ["x", "dy", "dx", *(["dz"] if added else [])]  # held: once
    t = 16 * 8 * 16 * 16 * 2
    streamed = {
        "forward": ["x", *forward],
        "forward_backward": ["x", *forward, *first, *second],
        "inference": forward,
    }
    held = {"forward": forward, "forward_backward": forward + both, "inference": forward}
    for mode in MODES:
        case = Case(LARGE, "contiguous", "bfloat16", kind, mode)
        assert case.moved_bytes(held=False) == len(streamed[mode]) * t
        assert case.moved_bytes(held=True) == len(held[mode]) * t
        assert case.written_bytes() == sum(name in ("y", "dx", "dz") for name in held[mode]) * t
        assert case.tensors() == len(set(held[mode]))


def test_every_case_of_the_gpu_can_be_made() -> None:
    made = list(cases(GPU_SHAPES, GPU_FORMATS))
    assert len({case.name for case in made}) == len(made) == (13 * 3 + 1) * 9
    assert {case.layout for case in made if len(case.size) == 2} == {"contiguous"}


def test_nothing_is_left_on_the_processor() -> None:
    """The device named meta takes no operand of another, as a GPU does not."""
    for case in cases((SMALL,), GPU_FORMATS[1:2]):
        inputs = make_inputs(case, "meta")
        results = peers.exact(case, inputs)
        assert {r.device.type for r in results} == {"meta"}
        for peer in (peers.ours, peers.eager):
            found = peers.call(case, inputs, peer(case))()
            assert [r.shape for r in found] == [r.shape for r in results]
            assert {r.device.type for r in found} == {"meta"}


def test_the_layers_are_measured_and_written(tmp_path: Path) -> None:
    chosen = list(cases((LARGE, "64x8"), GPU_FORMATS))
    cuda.layers(chosen, {"eager": peers.eager}, FAST, MACHINE, tmp_path)
    report = json.loads((tmp_path / "layers.json").read_text())
    assert report["environment"]["copy_bytes_per_second"] == 1e9
    assert [row["case"] for row in report["rows"]] == [case.name for case in chosen]
    for row in report["rows"]:
        t = row["milliseconds"]
        assert row["ratio"] == pytest.approx({"eager": t["eager"] / t["ours"]})
        assert row["copy_share"] == pytest.approx(row["moved_bytes"] / 1e6 / t["ours"])
        assert row["beyond_cache"] == (row["shape"] == LARGE)
        assert ("graph" in row) != row["beyond_cache"]
        assert row["input_sets"] * row["bytes"] >= 2 * MACHINE.cache_bytes
    text = (tmp_path / "layers.md").read_text()
    assert all(f"| {row['shape']} | {row['layout']} " in text for row in report["rows"])


def test_a_compiled_peer_is_compiled_once_for_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(module)
        return module.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: original(f, backend=backend, **given))
    case = Case(SMALL, "channels_last", "bfloat16", "add_relu", "forward_backward")
    row = cuda.measure(case, {"compile": peers.compiled}, FAST, MACHINE)
    assert row["input_sets"] > 1
    assert len(compiled) == 1


def test_a_peer_that_cannot_be_captured_is_left_out_of_the_graphs() -> None:
    calls = iter(range(3))

    def refusing(run: Callable[[], object]) -> Callable[[], object]:
        if next(calls) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run

    machine = cuda.Machine("cpu", 1e9, 1 << 13, refusing)
    case = Case(SMALL, "contiguous", "bfloat16", "relu", "forward")
    row = cuda.measure(case, {"one": peers.eager, "two": peers.eager}, FAST, machine)
    assert set(row["ratio"]) == {"one", "two"}
    assert set(row["graph"]["ratio"]) == {"two"}
    assert row["graph"]["refused"] == {"one": "operation not permitted when stream is capturing"}
    assert len(cuda.table([row]).splitlines()) == 3


@pytest.mark.parametrize(
    ("peer", "kind", "mode"),
    [(wrong_forward, "relu", "forward"), (wrong_backward, "plain", "forward_backward")],
)
@pytest.mark.parametrize(("layout", "type_name"), GPU_FORMATS)
def test_a_peer_that_disagrees_stops_the_run(
    peer: Callable[[Case], peers.Normalise],
    kind: str,
    mode: str,
    layout: str,
    type_name: str,
    tmp_path: Path,
) -> None:
    case = Case(LARGE, layout, type_name, kind, mode)
    with pytest.raises(SystemExit, match=f"{mode}: wrong is off by .*; no report"):
        cuda.layers([case], {"wrong": peer}, FAST, MACHINE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ours_is_held_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ours", wrong_forward)
    case = Case(SMALL, "contiguous", "bfloat16", "relu", "forward")
    with pytest.raises(SystemExit, match="ours is off"):
        cuda.measure(case, {}, FAST, MACHINE)


def row(shape: str, kind: str, share: float, eager: float, compiled: float) -> cuda.Row:
    case = Case(shape, "contiguous", "bfloat16", kind, "forward_backward")
    ratio = {"eager": eager, "compile": compiled}
    return {
        "case": shape,
        **vars(case),
        "beyond_cache": share > 0,
        "copy_share": share,
        "ratio": ratio,
    }


def test_the_summary_has_geometric_means_and_judges_them() -> None:
    rows = [
        row("a", "relu", 0.95, 2.0, 1.0),
        row("b", "relu", 0.91, 1.2, 1.25),
        row("c", "relu", 0.0, 1.7, 1.3),
        row("a", "add_relu", 0.93, 1.0, 1.2),
        row("b", "add_relu", 0.92, 1.9, 1.3),
    ]
    key = ("forward_backward", "relu", "bfloat16", "contiguous")
    found = cuda.means(rows)[key]
    assert found["eager"] == pytest.approx(np.exp(np.mean(np.log([2.0, 1.2, 1.7]))))
    assert found["compile"] == pytest.approx(np.exp(np.mean(np.log([1.0, 1.25, 1.3]))))
    lines = cuda.summary(rows).splitlines()
    verdicts = [line.rsplit(": ", 1)[1] for line in lines if line.startswith("- ")]
    # 0.91 of the copy; relu 1.60 and 1.18; add_relu √1.9 = 1.38 and 1.25
    assert verdicts == ["hold", "hold", "hold", "miss", "hold"]
    rows[1]["copy_share"] = 0.89
    what, *judged = cuda.targets(rows)[0]
    assert what == "least share of the copy's rate, b"
    assert judged == [0.89, 0.9]


def test_the_rate_of_copying_counts_what_is_read_and_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def two_seconds(call: Callable[[], object]) -> float:
        call()
        return 2.0

    monkeypatch.setitem(measure.TIMERS, "cpu", two_seconds)
    copies = 20  # a round of them, each of 4 kB read and 4 kB written
    assert measure.copy_rate(4096, "cpu") == copies * (4096 + 4096) / 2


def test_a_network_that_keeps_what_a_norm_keeps_is_the_identitys() -> None:
    def gradients(norm: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        block = resnet.basic(resnet.NORMS[norm], 3, 4, 2)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        loss = block(x).square().sum()
        return [loss, *torch.autograd.grad(loss, [x, *block.parameters()])]

    for kept, plain in zip(gradients("kept"), gradients("identity"), strict=True):
        torch.testing.assert_close(kept, plain)
    x = torch.randn(2, 4, 3, 3)
    before = x.clone()
    resnet.NORMS["kept"](4)(x)
    assert torch.equal(x, before)  # the identity's ReLU is in place
    resnet.NORMS["identity"](4)(x)
    assert not torch.equal(x, before)


def test_the_network_is_resnet_50() -> None:
    """The number of parameters that torchvision publishes."""
    with torch.device("meta"):
        model = resnet50.VARIANTS["ours"]()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


class Detached(Torch):
    """A norm whose gradient does not pass through the statistics."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        var, mean = torch.var_mean(x.detach().float(), (0, 2, 3), correction=0)
        y = F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y


def variants(**norms: Callable[..., nn.Module]) -> dict[str, Callable[[], nn.Module]]:
    return {name: lambda norm=norm: resnet50.resnet50(norm) for name, norm in norms.items()}


def test_a_resnet_50_step_is_measured_and_written(tmp_path: Path) -> None:
    both = variants(torch=Torch, ours=ours)
    resnet50.report("cpu", batch=16, size=32, seconds=FAST, out=tmp_path, variants=both)
    report = json.loads((tmp_path / "resnet50.json").read_text())
    assert set(report["milliseconds"]) == {"torch", "ours"}
    assert report["ratio"]["ours"] == 1
    assert report["steps"] >= 5


def test_a_resnet_50_with_a_wrong_gradient_is_not_reported(tmp_path: Path) -> None:
    wrong = variants(torch=Torch, ours=Detached)
    with pytest.raises(SystemExit, match="ours is off in its gradient"):
        resnet50.report("cpu", batch=16, size=32, seconds=FAST, out=tmp_path, variants=wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_exactness_has_ours_beside_torchs() -> None:
    rows = exactness.measure((8, 4, 5, 5), torch.channels_last, 1e3, "cpu")
    assert [row["threads"] for row in rows] == [1, 2]
    for row in rows:
        assert max(row["ours"].values()) < 1e-4  # x is known to 6e-5 of a standard deviation
        assert row["torch"]["y"] > row["ours"]["y"]


def test_the_benchmark_of_the_processor_measures_a_case() -> None:
    case = Case("60x100", "contiguous", "float32", "add_relu", "forward_backward")
    bounds = processor.Bounds()
    found = processor.measure(case, FAST, bounds, ["eager", "oneDNN"])
    assert set(found["ratio"]) == {"eager"}  # oneDNN takes no such case
    t = 60 * 100 * 4
    rates, (call,) = bounds.rates[t, 6], bounds.calls.values()
    floor = 6 * t / rates.copy + t / rates.read  # three copies and one more tensor to read
    assert found["floor_share"] == pytest.approx(floor / (1e-3 * found["milliseconds"]["ours"]))
    eager = 1e-3 * found["milliseconds"]["eager"]
    (value,) = bounds.arithmetic.values()
    reckoning = value * 60 * 100 / torch.get_num_threads()
    assert found["seconds"] == pytest.approx(
        {"bytes": floor, "arithmetic": reckoning, "call": call}
    )
    assert found["overlapped"] == pytest.approx(eager / (call + max(floor, reckoning)))
    assert found["in_turn"] == pytest.approx(eager / (call + floor + reckoning))
    line = processor.summary([found]).splitlines()[-1]
    assert f"{eager / (1e-3 * found['milliseconds']['ours']):.2f}× | 60x100" in line


def test_a_median_ratio_is_of_turns_with_the_interval_of_the_sign_test() -> None:
    slow = [1.0, 3.0, 2.0, 7.0, 1.0, 1.0, 2.0, 5.0, 1.0, 4.0, 3.0]  # slows both alike
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    times = [a * b for a, b in zip(slow, ratios, strict=True)]
    # Of 11, P(at most 1 below the median) = 12/2048 and P(at most 2) = 67/2048, over 1/40.
    assert measure.median_ratio(times, slow) == pytest.approx((1.5, 1.1, 1.9))


@pytest.mark.parametrize(
    ("shape", "layout", "part"),
    [
        ("32x512x7x7", "contiguous", "32x41x7x7"),
        ("32x64x112x112", "contiguous", "2x4x112x112"),
        ("32x64x56x56", "channels_last", "2x64x56x56"),
        ("4096x1024", "contiguous", "512x128"),
        ("60x100", "contiguous", "60x100"),
    ],
)
def test_what_stays_in_a_cores_cache_has_rows_as_long(shape: str, layout: str, part: str) -> None:
    assert Case(shape, layout, "bfloat16", "relu", "forward").in_cache().shape == part


@pytest.mark.parametrize("type_", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_least_program_goes_through_the_whole_tensor(shape: str, type_: str) -> None:
    case = Case(shape, "contiguous", type_, "relu", "forward_backward")
    ways = least.variants(case)
    assert {way.way for way in ways} == set(range(least.WAYS))
    assert all(way.rows * way.length * way.groups == case.values() for way in ways)
    size = case.bytes() // case.values()
    streamed = [way for way in ways if way.stream]
    assert all(way.length * size % 64 == way.stride * size % 64 == 0 for way in streamed)


@pytest.mark.skipif("avx512" not in ops.kernels()["cpu"], reason="least.cpp needs AVX-512")
def test_the_least_program_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(least, "SHAPES", ("4x8x16x16", "64x128"))
    monkeypatch.setattr(least, "BETWEEN", 1 << 12)
    command = ["least", "--only", "float32", "--seconds", str(FAST), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    least.main()
    rows = json.loads((tmp_path / "least.json").read_text())["rows"]
    assert len(rows) == 4
    assert all(0 < row["least"] < 1 and row["bound"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| float32 |") == 2
