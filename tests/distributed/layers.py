"""What a layer with Sync statistics computes, across processes.

Each check returns what it found: a truth, or the largest difference from one process on the whole
batch, computed by the formula in float64.
"""

import datetime
import time

import torch
import torch.distributed as dist
from tests.distributed.processes import distance, draw, identical, total
from torch import nn
from torch.autograd import forward_ad

import batchnorm
from batchnorm import BatchNorm1d, Sync, functional

EPS = 1e-5
SIZES = {2: [5, 3], 4: [3, 1, 5, 2]}
WITH_EMPTY = {2: [4, 0], 4: [3, 0, 5, 2]}


def by_formula(x, w, b, r, activation, mask):
    """[P1] Algorithm 1 on one process, by autograd's own derivatives: y, mean, variance, n."""
    counted = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x)
    axes = [0, *range(2, x.dim())]
    shape = (1, -1) + (1,) * (x.dim() - 2)
    n = counted.sum()
    mean = (x * counted).sum(axes) / n
    var = ((x - mean.view(shape)).square() * counted).sum(axes) / n
    z = (x - mean.view(shape)) / (var + EPS).sqrt().view(shape) * w.view(shape) + b.view(shape)
    z = z if r is None else z + r
    return (z if activation is None else getattr(nn.functional, activation)(z)), mean, var, n


def against_the_whole(
    rank,
    sizes,
    shape=(3, 4, 2),
    dtype=torch.float64,
    layout=torch.Tensor.contiguous,
    residual=False,
    activation=None,
    mask=None,
    group=None,
):
    """Forward, backward and running statistics of a layer on shares of a batch."""
    channels = shape[0]
    x = draw(sum(sizes), *shape).mul(3).add(2).to(dtype).double()
    r = draw(sum(sizes), *shape, seed=1).to(dtype).double() if residual else None
    dy = draw(sum(sizes), *shape, seed=2).to(dtype).double()
    w, b = draw(channels, seed=3), draw(channels, seed=4)
    whole = [t.clone().requires_grad_() for t in (x, w, b)]
    whole_r = None if r is None else r.clone().requires_grad_()
    y, mean, var, n = by_formula(*whole, whole_r, activation, mask)
    y.backward(dy)

    layer = batchnorm.nn.BatchNorm(
        channels, activation=activation, statistics=Sync(group), dtype=torch.float64
    )
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)

    def mine(t):
        return None if t is None else t.split(sizes)[rank]

    leaf = layout(mine(x).to(dtype)).detach().requires_grad_()
    leaf_r = None if r is None else layout(mine(r).to(dtype)).detach().requires_grad_()
    got = layer(leaf, leaf_r, mask=mine(mask))
    got.backward(mine(dy).to(dtype))
    assert got.dtype == dtype
    assert got.stride() == leaf.stride()
    unbiased = var * n / (n - 1)
    found = {
        "y": distance(got, mine(y)),
        "dx": distance(leaf.grad, mine(whole[0].grad)),
        "dresidual": 0.0 if r is None else distance(leaf_r.grad, mine(whole_r.grad)),
        "running mean": distance(layer.running_mean, 0.1 * mean),
        "running var": distance(layer.running_var, 0.9 + 0.1 * unbiased),
        "batches": layer.num_batches_tracked.item() == 1,
    }
    if group is None:
        found |= {
            "dweight": distance(total(layer.weight.grad), whole[1].grad),
            "dbias": distance(total(layer.bias.grad), whole[2].grad),
            "identical": identical(layer.running_mean, layer.running_var),
        }
    return found


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def even(rank, world):
    return against_the_whole(rank, [4] * world)


def uneven(rank, world):
    return against_the_whole(rank, SIZES[world])


def one_value_each(rank, world):
    return against_the_whole(rank, [1] * world, shape=(3,))


def one_empty(rank, world):
    return against_the_whole(rank, WITH_EMPTY[world], residual=True, activation="relu")


def channels_innermost(rank, world):
    return against_the_whole(rank, SIZES[world], layout=channels_last, activation="silu")


def residual_and_relu(rank, world):
    return against_the_whole(rank, SIZES[world], residual=True, activation="relu")


def residual_and_gelu(rank, world):
    return against_the_whole(rank, SIZES[world], residual=True, activation="gelu")


def masked(rank, world):
    mask = draw(sum(SIZES[world]), 4, 2, seed=5) > 0
    mask.split(SIZES[world])[0].fill_(False)  # one process counts nothing
    return against_the_whole(rank, SIZES[world], mask=mask, activation="silu", residual=True)


def masked_and_empty(rank, world):
    sizes = WITH_EMPTY[world]
    return against_the_whole(rank, sizes, mask=draw(sum(sizes), 4, 2, seed=5) > 0)


def bfloat16(rank, world):
    return against_the_whole(rank, SIZES[world], dtype=torch.bfloat16)


def float16(rank, world):
    return against_the_whole(rank, SIZES[world], dtype=torch.float16, layout=channels_last)


def float32(rank, world):
    return against_the_whole(rank, SIZES[world], dtype=torch.float32)


def subgroups(rank, world):
    """Every other process, with statistics of their own; a group may be of one."""
    groups = [list(range(start, world, 2)) for start in (0, 1)]
    made = [dist.new_group(ranks) for ranks in groups]
    mine = groups[rank % 2]
    sizes = [SIZES[world][r] for r in mine]
    return against_the_whole(mine.index(rank), sizes, group=made[rank % 2])


def far_from_zero(rank, world):
    """E[x²] − E[x]² would lose half of the digits: mean/std of 1e4, and shares of other means."""
    x = draw(4 * world, 3) + 1e4 + torch.arange(world).double().repeat_interleave(4)[:, None]
    y, moments = functional.sync_batch_norm(x.split(4)[rank])
    want = (x - x.mean(0)) / (x.var(0, correction=0) + EPS).sqrt()
    return {
        "y": distance(y, want.split(4)[rank]),
        "var": distance(moments.var, x.var(0, correction=0)),
    }


def second_derivatives(rank, world):
    """A gradient penalty, beside a loss of y: both ways through the moments at once."""
    sizes = {2: SIZES, 4: WITH_EMPTY}[world][world]
    x, v, u = (draw(sum(sizes), 3, 2, seed=s) for s in range(3))
    w, b = draw(3, seed=3), draw(3, seed=4)

    def loss(y, x, v, u):
        (g,) = torch.autograd.grad((y * v).sum(), x, create_graph=True)
        return (g.square() * u).sum() + y.pow(3).sum()

    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    y, *_ = by_formula(*leaves, None, "silu", None)
    want = torch.autograd.grad(loss(y, leaves[0], v, u), leaves)
    mine = [t.split(sizes)[rank] for t in (x, v, u)]
    leaves = [t.clone().requires_grad_() for t in (mine[0], w, b)]
    y, _ = functional.sync_batch_norm(*leaves, activation="silu")
    got = torch.autograd.grad(loss(y, leaves[0], *mine[1:]), leaves)
    return {
        "x": distance(got[0], want[0].split(sizes)[rank]),
        "w": distance(total(got[1]), want[1]),
        "b": distance(total(got[2]), want[2]),
    }


class Enter(torch.autograd.Function):
    """From a value that all processes have to shares of the work: gradients are summed."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return Leave.apply(g)


class Leave(torch.autograd.Function):
    """The sum of all processes' shares, which all have."""

    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, g):
        return Enter.apply(g)


def finite_differences(rank, world):
    """gradcheck and gradgradcheck of the whole batch's y and moments, all processes in step."""
    sizes = {2: [2, 1], 4: [1, 0, 1, 1]}[world]
    mask = torch.tensor([[True, True], [False, True], [True, False]])

    def f(masked):
        def whole(x, w, b, r):
            x, w, b, r = (Enter.apply(t) for t in (x, w, b, r))
            parts = [torch.zeros_like(part) for part in x.split(sizes)]
            parts[rank], (mean, var, _) = functional.sync_batch_norm(
                *(x.split(sizes)[rank], w, b),
                residual=r.split(sizes)[rank],
                activation="silu",
                mask=mask.split(sizes)[rank] if masked else None,
            )
            # All processes have the moments; each vouches for its part of their gradients.
            return Leave.apply(torch.cat(parts)), mean, var

        return whole

    shapes = ((3, 2, 2), (2,), (2,), (3, 2, 2))
    inputs = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    found = {}
    for masked in (False, True):
        # The gradient of the moments is summed over processes, each of which asks for all of it.
        def y_alone(*inputs, masked=masked):
            return f(masked)(*inputs)[0]

        def shared(*inputs, masked=masked):
            y, mean, var = f(masked)(*inputs)
            return y, Leave.apply(mean / world), Leave.apply(var / world)

        found[f"first, masked={masked}"] = torch.autograd.gradcheck(shared, inputs, fast_mode=True)
        found[f"second, masked={masked}"] = torch.autograd.gradgradcheck(
            y_alone, inputs, fast_mode=True
        )
    return found


def too_few(rank, world):
    layer = BatchNorm1d(3, statistics=Sync())
    y = layer(torch.empty(0, 3))
    found = {"empty": y.shape == (0, 3) and layer.num_batches_tracked.item() == 0}
    for name, options in {
        "one": {},
        "masked": {"mask": torch.ones(int(rank == 0), dtype=torch.bool)},
    }.items():
        try:
            layer(torch.ones(int(rank == 0), 3), **options)
        except ValueError as error:
            found[name] = "more than 1 value per channel when training" in str(error)
        else:
            found[name] = False
    return found


def torch_func(rank, world):
    """Reverse mode works; what would exchange wrong numbers is refused."""
    x = draw(4, 3, seed=rank)

    def f(x):
        return functional.sync_batch_norm(x)[0].pow(3).sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf), leaf)
    found = {t.__name__: distance(t(f)(x), want) for t in (torch.func.grad, torch.func.jacrev)}

    def dual():
        with forward_ad.dual_level():
            f(forward_ad.make_dual(x, x))

    for name, call, message in (
        ("vmap", lambda: torch.vmap(f)(x[None]), "cannot be mapped by vmap"),
        ("jvp", lambda: torch.func.jvp(f, (x,), (x,)), "no forward mode"),
        ("dual", dual, "no forward mode"),
    ):
        try:
            call()
        except NotImplementedError as error:
            found[name] = message in str(error)
        else:
            found[name] = False
    return found


def skipped(rank, world):
    """A process that does not call the layer: the others are told what to look for."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    if rank == 1:
        time.sleep(2)
        return {}
    try:
        BatchNorm1d(3, statistics=Sync(group))(torch.randn(4, 3))
    except RuntimeError as error:
        return {"named": "did not call the layer as often" in "".join(error.__notes__)}
    return {"named": False}
