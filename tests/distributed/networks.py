"""What networks with Sync statistics learn and keep, across processes; returns as layers.py."""

import copy
from contextlib import nullcontext

import torch
import torch._dynamo.testing
import torch.distributed as dist
from tests.distributed.layers import SIZES, WITH_EMPTY
from tests.distributed.processes import distance, draw, identical
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, Sync, recalibrate, synchronize
from batchnorm.transforms.recalibrate import alone


class Bounded(nn.BatchNorm2d):
    """A user's own, which adds to torch's forward."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bounded = Bounded(4)
        self.last = nn.Linear(4, 3)
        self.checkpoints = False

    def body(self, x):
        x = self.norm(self.first(x)).relu()
        return self.bounded(self.second(x)) + x

    def forward(self, x):
        body = checkpoint(self.body, x, use_reentrant=False) if self.checkpoints else self.body(x)
        return self.last(body.mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Block().double()


def trained(rank, world, sizes, checkpoints=False, accumulate=1):
    """Three steps under DistributedDataParallel, and by torch alone on whole batches."""
    whole, model = network(), network()
    synchronize(model)
    model.checkpoints = checkpoints
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    optimisers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (whole, model)]
    for step in range(3):
        for part in range(accumulate):
            x = draw(sum(sizes), 2, 5, 5, seed=10 * step + part)
            target = draw(sum(sizes), 3, seed=10 * step + part + 5)
            nn.functional.mse_loss(whole(x), target).backward()
            with nullcontext() if part == accumulate - 1 else ddp.no_sync():
                error = ddp(x.split(sizes)[rank]) - target.split(sizes)[rank]
                if len(set(sizes)) == 1:
                    loss = error.square().mean()
                else:  # as the docstring of sync_batch_norm says
                    loss = error.square().sum() / target.numel() * world
                loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    want, got = whole.state_dict(), model.state_dict()
    found = {name: distance(got[name], want[name]) for name in want}
    return found | {
        "identical": identical(*got.values()),
        "keys": list(want) == list(got),
        "batches": model.norm.num_batches_tracked.item() == 3 * accumulate,
    }


def trained_evenly(rank, world):
    return trained(rank, world, [4] * world)


def trained_unevenly_with_one_empty(rank, world):
    return trained(rank, world, WITH_EMPTY[world])


def trained_with_checkpoints(rank, world):
    return trained(rank, world, SIZES[world], checkpoints=True)


def trained_with_accumulation(rank, world):
    return trained(rank, world, SIZES[world], accumulate=2)


def compiled(rank, world):
    """Whole, forward and backward; all processes and a subgroup; sizes that change."""
    found = {}
    for name, group in (("all", None), ("group", dist.new_group(list(range(world))))):
        torch._dynamo.reset()
        eager, layer = (BatchNorm2d(3, activation="relu", statistics=Sync(group)) for _ in "ab")
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        f = torch.compile(layer, backend=counter, fullgraph=True)
        largest = 0.0
        for step, size in enumerate((2, 4, 6)):
            x = draw(size + rank, 3, 2, 2, seed=10 * rank + step).float()
            grads = []
            for module in (f, eager):
                leaf = x.clone().requires_grad_()
                module(leaf, leaf).square().sum().backward()
                grads.append(leaf.grad)
            largest = max(largest, distance(*grads))
        found |= {
            f"{name} dx": largest,
            f"{name} dweight": distance(layer.weight.grad, eager.weight.grad),
            f"{name} running": distance(layer.running_var, eager.running_var),
            f"{name} graphs": counter.frame_count <= 2,
            f"{name} identical": identical(layer.running_mean, layer.running_var),
        }
    return found


def batches_of(rank, world):
    counts = {2: [3, 1], 4: [3, 0, 2, 1]}[world]
    return [
        [draw(4 + b, 2, 5, 5, seed=10 * r + b) + r for b in range(n)] for r, n in enumerate(counts)
    ]


def recalibrated(rank, world):
    """Each process another number of batches, one none: as one process with the batches of all."""
    found = {}
    shares = batches_of(rank, world)
    for method in ("pooled", "mean"):
        whole, model = network(), network()
        synchronize(model)
        done = []
        want = alone(whole, [b for share in shares for b in share], method=method)
        got = recalibrate(
            model, shares[rank], method=method, progress=lambda *a, done=done: done.append(a)
        )
        names = [name for name in whole.state_dict() if "running" in name]
        found |= {
            f"{method} {name}": distance(model.get_buffer(name), whole.get_buffer(name))
            for name in names
        }
        found |= {
            f"{method} identical": identical(*model.state_dict().values()),
            f"{method} report": got == want,
            f"{method} progress": done == [(i + 1, len(shares[rank])) for i in range(len(done))],
            f"{method} batches": model.norm.num_batches_tracked.item() == want.batches,
            f"{method} statistics": repr(model.norm.statistics) == "Sync()",
        }
    return found


def recalibration_fails(rank, world):
    """What fails on one process fails on all, and no network is changed."""

    def loader():
        yield draw(4, 2, 5, 5)
        if rank == 1:
            raise OSError("the disk is gone")

    found = {}
    model = network()
    before = copy.deepcopy(model.state_dict())
    cases = {
        "loader": (model, loader(), OSError, "the disk is gone"),
        "shape": (model, [draw(4, 2 + (rank == 1), 5, 5)], RuntimeError, "channels"),
        "empty": (model, [], ValueError, "no batch"),
        "nan": (model, [draw(4, 2, 5, 5) / (rank != 1)], ValueError, "not finite"),
    }
    for name, (network_, batches, error, message) in cases.items():
        everywhere = name in ("empty", "nan")
        if not everywhere and rank != 1:
            error, message = RuntimeError, "failed on rank 1 ("
        try:
            recalibrate(network_, batches)
        except error as raised:
            found[name] = message in str(raised)
        else:
            found[name] = False
    if rank == 1:
        model.norm.momentum = 0
    try:
        recalibrate(model, [draw(4, 2, 5, 5)])
    except RuntimeError as raised:
        found["other layers"] = "different layers: rank 0 norm, bounded; rank 1 bounded" in str(
            raised
        )
    found["unchanged"] = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    theirs = nn.Sequential(nn.SyncBatchNorm(2))
    try:
        recalibrate(theirs, [draw(4, 2)])
    except ValueError as raised:
        found["torch's"] = "0 is a SyncBatchNorm" in str(raised)
    return found


def adapted(rank, world):
    """Each to its own data, as many batches as it has: nobody waits."""
    model = nn.Sequential(BatchNorm1d(3, statistics=Sync())).double()
    x = draw(6, 3, seed=rank) + rank
    loader = x.split(2)[: 1 + rank % 2]
    batchnorm.adapt(model, loader, prior=0, entropy_lr=1e-3)
    return {"mean": distance(model[0].running_mean, torch.cat(loader).mean(0))}
