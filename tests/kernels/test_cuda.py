"""What a GPU has and a CPU has not: graphs, streams, several devices.

The rest of the suite runs on it with ``BATCHNORM_TEST_DEVICE=cuda``.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tests.tolerances import HALF, LIKE_TORCH

from batchnorm import BatchNorm2d, ops, synchronize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# One launch without meeting, one with, two launches.
SHAPES = [(32, 64, 7, 7), (64, 64, 14, 14), (64, 64, 56, 56)]


def draw(shape, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device)


def step(layer, x, residual):
    """Return output and gradients."""
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    y = layer(*leaves)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [*leaves, *layer.parameters()])


def same(got, want, tolerance=0.0):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_kernels_are_used():
    assert ops.kernels()["cuda"].startswith("triton")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_replays_what_was_captured(shape, layout):
    layer = BatchNorm2d(shape[1], activation="relu", device="cuda")
    x, residual = (draw(shape, seed).to(memory_format=layout) for seed in (0, 1))
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        step(layer, x, residual)  # compiles
    torch.cuda.current_stream().wait_stream(other)
    eager = copy.deepcopy(layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, x, residual)
    for seed in (2, 3, 4):
        x.copy_(draw(shape, seed))
        graph.replay()
        same(results, step(eager, x, residual))
    same(layer.state_dict(), eager.state_dict())


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_do_not_meet_each_other(shape):
    layers = [BatchNorm2d(shape[1], activation="relu", device="cuda") for _ in range(4)]
    inputs = [(draw(shape, i), draw(shape, 10 + i)) for i in range(4)]
    want = [step(copy.deepcopy(layer), *each) for layer, each in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for layer, each, stream in zip(layers, inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(step(layer, *each))
        torch.cuda.synchronize()
        same(got, want)


@pytest.mark.filterwarnings("ignore")  # those of the compiler that torch brings
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_whole(shape):
    torch._dynamo.reset()
    layer = BatchNorm2d(shape[1], activation="relu", device="cuda")
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    x, residual = draw(shape), draw(shape, 1)
    same(compiled(x, residual), eager(x, residual), LIKE_TORCH)
    same(layer.state_dict(), eager.state_dict(), LIKE_TORCH)


def test_autocast_in_a_network():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(16, 64, 3, padding=1, bias=False, device="cuda")
    layer = BatchNorm2d(64, activation="relu", device="cuda")
    x = draw((16, 16, 28, 28)).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(convolution(x))
    want = copy.deepcopy(layer)(convolution(x))
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y.float() - want).square().mean().sqrt() <= HALF
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@several
def test_a_device_that_is_not_the_current_one():
    for shape in SHAPES:
        layer = BatchNorm2d(shape[1], activation="relu", device="cuda:0")
        want = step(copy.deepcopy(layer), draw(shape), draw(shape, 1))
        got = step(layer.to("cuda:1"), draw(shape, device="cuda:1"), draw(shape, 1, "cuda:1"))
        same([t.to("cuda:0") for t in got], list(want))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu"), torch.nn.Flatten()
    ).double()


def rank_of_two(rank, store, queue):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"file://{store}", rank=rank, world_size=2)
    model = synchronize(network().cuda())
    ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
    x = draw((6, 3, 9, 9), device=f"cuda:{rank}").double()
    share = x[:2] if rank == 0 else x[2:]
    # DDP divides by the number of ranks what one process would add up.
    (2 * ddp(share).square().sum()).backward()
    queue.put((rank, [p.grad.tolist() for p in model.parameters()], model[1].running_var.tolist()))
    dist.barrier()
    dist.destroy_process_group()


@several
def test_two_devices_are_one_batch(tmp_path):
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path / "store"), queue), nprocs=2)
    results = [queue.get(), queue.get()]
    model = network().cuda()
    model(draw((6, 3, 9, 9)).double()).square().sum().backward()
    for _, gradients, running_var in results:
        for got, parameter in zip(gradients, model.parameters(), strict=True):
            same(torch.tensor(got, dtype=torch.float64), parameter.grad.cpu(), LIKE_TORCH)
        same(torch.tensor(running_var), model[1].running_var.cpu().float(), LIKE_TORCH)
