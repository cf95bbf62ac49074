"""Start real processes that run the checks, and what the checks share."""

import datetime
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

import batchnorm

# A slow machine may compile for longer in one process than in another.
TIMEOUT = datetime.timedelta(seconds=120)
WHEN_KILLED = datetime.timedelta(seconds=10)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def total(t):
    t = t.detach().clone()
    dist.all_reduce(t)
    return t


def identical(*tensors):
    """Tell whether every process has the same bits."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    everybody = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, flat)
    return all(torch.equal(flat, other) for other in everybody)


def distance(a, b):
    """Return the largest difference, of the largest value or of 1."""
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def killed(rank, world):
    """The last act: process 1 is killed between forward and backward, in a group of 10 s."""
    group = dist.new_group(timeout=WHEN_KILLED)
    layer = batchnorm.BatchNorm1d(3, statistics=batchnorm.Sync(group))
    y = layer(torch.randn(4, 3, requires_grad=True))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    y.sum().backward()


def work(rank, world, checks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT
    )
    results, seconds = {}, {}
    for check in checks:
        started = time.perf_counter()
        results[check.__name__] = check(rank, world)
        seconds[check.__name__] = time.perf_counter() - started
    torch.save((results, seconds), f"{folder}/{rank}.results")
    dist.barrier()
    started = time.perf_counter()
    try:
        killed(rank, world)
    except RuntimeError as error:
        said = "\n".join([str(error), *error.__notes__])
        torch.save((time.perf_counter() - started, said), f"{folder}/{rank}.end")
        raise


def run(world, checks, folder: Path):
    """Return results and seconds of each process, exit codes, and what the others saw of a kill."""
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=work, args=(rank, world, checks, str(folder)))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + 2 * TIMEOUT.total_seconds()
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode for process in started]
    ranks = range(world)
    failed = [rank for rank in ranks if not (folder / f"{rank}.results").exists()]
    assert not failed, f"no results of processes {failed}, which ended with {codes}; see stderr"
    results = [torch.load(folder / f"{rank}.results") for rank in ranks]
    ends = [torch.load(end) for end in sorted(folder.glob("*.end"))]
    return results, codes, ends
