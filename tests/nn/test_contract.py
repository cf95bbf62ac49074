"""What every layer owes to the rest of PyTorch: one contract, over all layers and statistics."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.multiprocessing
from tests import tolerances
from tests.device import DEVICE, INTERPRETED
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import batchnorm
from batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Frozen,
    Ghost,
    Guard,
    Lp,
    Ramp,
    Renorm,
    Sync,
)

RENORM = Renorm(r_max=1.5, d_max=0.5, schedule=Ramp(0, 2, 2))
LAYERS = {
    "1d": (partial(BatchNorm1d, 3), (8, 3)),
    "sequence": (partial(BatchNorm1d, 3, activation="gelu"), (8, 3, 2)),
    "2d": (partial(BatchNorm2d, 3, activation="relu"), (8, 3, 2, 3)),
    "3d": (partial(BatchNorm3d, 3, activation="leaky_relu"), (8, 3, 2, 1, 2)),
    "cumulative": (partial(BatchNorm1d, 3, momentum=None), (8, 3)),
    "untracked": (partial(BatchNorm1d, 3, track_running_stats=False), (8, 3)),
    "plain": (partial(BatchNorm1d, 3, affine=False), (8, 3)),
    "guarded": (partial(BatchNorm1d, 3, guard=Guard()), (8, 3)),
    "ghost": (partial(BatchNorm1d, 3, statistics=Ghost(4)), (8, 3, 2)),
    "ghost, remainder": (partial(BatchNorm1d, 3, statistics=Ghost(3)), (8, 3, 2)),
    "renorm": (partial(BatchNorm1d, 3, statistics=RENORM), (8, 3)),
    "l1": (partial(BatchNorm1d, 3, statistics=Lp(1)), (8, 3)),
    "l-infinity": (partial(BatchNorm1d, 3, statistics=Lp(math.inf, central=True)), (8, 3)),
    "frozen": (partial(BatchNorm1d, 3, statistics=Frozen()), (8, 3)),
    "sync": (partial(BatchNorm1d, 3, statistics=Sync()), (8, 3)),
}


@pytest.fixture(params=LAYERS)
def make(request):
    """Return a maker of equal layers and one of inputs."""
    constructor, shape = LAYERS[request.param]

    def layer(**options):
        made = constructor(**{"device": DEVICE, **options})
        generator = torch.Generator().manual_seed(7)
        for parameter in made.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        if made.running_mean is not None:
            made.running_mean.copy_(torch.randn(3, generator=generator))
            made.running_var.copy_(0.5 + 1.5 * torch.rand(3, generator=generator))
        return made

    def draw(samples=shape[0], seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(samples, *shape[1:], generator=generator, dtype=dtype).to(DEVICE)

    return layer, draw


def same(a, b, tolerance=0.0):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_first_and_second_order(make, training):
    layer, draw = make
    module = layer(dtype=torch.float64).train(training)
    # Frozen buffers, as finite differences call again and again.
    buffers = dict(module.named_buffers())
    names = [name for name, _ in module.named_parameters()]

    def f(x, r, *parameters):
        given = dict(zip(names, parameters, strict=True))
        given |= {name: value.clone() for name, value in buffers.items()}
        return functional_call(module, given, (x, r))

    inputs = [draw(dtype=torch.float64), draw(seed=1, dtype=torch.float64)]
    if "activation='relu'" in repr(module):
        inputs[1] += 0.1 * inputs[1].sign()
    inputs += [p.detach().clone() for p in module.parameters()]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=INTERPRETED)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_whole_and_once_for_all_batch_sizes(make, training):
    layer, draw = make
    torch._dynamo.reset()
    eager, module = layer().train(training), layer().train(training)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for step, samples in enumerate((8, 12, 16, 16, 20, 24)):
        x = draw(samples, seed=step)
        results = []
        for f in (compiled, eager):
            leaf = x.clone().requires_grad_()
            y = f(leaf, leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        same(*results, tolerances.LIKE_TORCH)
    same(module.state_dict(), eager.state_dict(), tolerances.LIKE_TORCH)
    # One graph for the first size and one for any size: none for a step. Ghosts have one for
    # batches without a remainder and one for those with, of the first size and of any.
    assert counter.frame_count <= (4 if "Ghost" in repr(module) else 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_by_inductor():
    """The filter is for what torch itself imports there."""
    torch._dynamo.reset()
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    eager = torch.nn.Sequential(BatchNorm2d(3, activation="relu", device=DEVICE), torch.nn.ReLU())
    module = copy.deepcopy(eager)
    same(torch.compile(module, fullgraph=True)(x), eager(x), tolerances.LIKE_TORCH)
    same(module.state_dict(), eager.state_dict(), tolerances.LIKE_TORCH)


def test_wrong_input_is_named_under_compile_too():
    torch._dynamo.reset()
    compiled = torch.compile(BatchNorm1d(3, device=DEVICE), backend="aot_eager")
    with pytest.raises(ValueError, match="weight must have one value for each of the 4 channels"):
        compiled(torch.ones(5, 4, device=DEVICE))


@pytest.mark.parametrize("training", [True, False])
def test_exported(make, training):
    layer, draw = make
    module = layer().train(training)
    eager = copy.deepcopy(module)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    if "Ghost(size=3)" in repr(module) and training:
        dynamic = None  # whether there is a remainder decides the graph
    program = torch.export.export(module, (draw(),), dynamic_shapes=dynamic)
    exported = program.module()
    for samples in (8, 16) if dynamic else (8, 8):
        x = draw(samples, seed=samples)
        same(exported(x), eager(x), tolerances.LIKE_TORCH)
    same(exported.state_dict(), eager.state_dict(), tolerances.LIKE_TORCH)


def test_torch_func_in_training(make):
    layer, draw = make
    x, v = draw(dtype=torch.float64), draw(seed=1, dtype=torch.float64)

    def loss(module):
        return lambda x: (module(x) * v).square().sum()

    leaf = x.clone().requires_grad_()
    plain = layer().double()
    (expected,) = torch.autograd.grad(loss(plain)(leaf), leaf)
    for transform in (grad, jacrev, lambda f: lambda x: vmap(grad(f))(x[None])[0]):
        module = layer().double()
        same(transform(loss(module))(x), expected, tolerances.DOUBLE)
        same(module.state_dict(), plain.state_dict(), tolerances.DOUBLE)
    module = layer().double()
    _, tangent = jvp(loss(module), (x,), (v,))
    same(tangent, (expected * v).sum(), tolerances.DOUBLE)
    same(module.state_dict(), plain.state_dict(), tolerances.DOUBLE)


def test_an_ensemble_is_a_vmap(make):
    layer, draw = make
    modules = [layer() for _ in range(3)]
    for i, module in enumerate(modules):
        module.load_state_dict({k: v + i for k, v in module.state_dict().items()})
    parameters, buffers = stack_module_state(modules)
    base = copy.deepcopy(modules[0]).to("meta")
    x = torch.stack([draw(seed=i) for i in range(3)])
    y = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, x)
    for i, module in enumerate(modules):
        same(y[i], module(x[i]), tolerances.LIKE_TORCH)
        for name, value in module.named_buffers():
            same(buffers[name][i], value, tolerances.LIKE_TORCH)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(make, training):
    layer, draw = make
    module = layer().train(training)
    x = draw()
    linear = torch.nn.Linear(x.shape[-1], x.shape[-1], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = module(linear(x))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in (*module.parameters(), *linear.parameters()))
    if module.running_mean is not None:
        assert module.running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_model_in_half(make, dtype):
    layer, draw = make
    module, wide = layer().to(dtype), layer().to(dtype).float()
    x = draw().to(dtype)
    same(module(x).float(), wide(x.float()), tolerances.HALF)
    for name, value in wide.named_buffers():
        same(module.get_buffer(name), value, tolerances.LIKE_TORCH)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m)],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_duplicates(make, duplicate):
    layer, draw = make
    module = layer()
    module(draw())
    other = duplicate(module)
    assert repr(other) == repr(module)
    same(other.state_dict(), module.state_dict())
    same(other.eval()(draw()), module.eval()(draw()))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_state_dict_is_safe_to_load(make):
    layer, draw = make
    module = layer()
    module(draw())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = layer()
    other.load_state_dict(torch.load(file, weights_only=True))
    same(other.state_dict(), module.state_dict())


def test_printing_is_how_to_make_it(make):
    layer, _ = make
    names = {name: getattr(batchnorm, name) for name in batchnorm.__all__} | {"inf": math.inf}
    text = repr(layer())
    assert repr(eval(text, names)) == text


def test_meta_device(make):
    layer, draw = make
    module = layer(device="meta")
    assert all(t.is_meta for t in module.state_dict().values())
    y = module(draw().to("meta"))
    assert y.is_meta
    assert y.shape == draw().shape
    real = module.to_empty(device=DEVICE)
    real.load_state_dict(layer().state_dict())
    same(real(draw()), layer()(draw()))


def ddp_rank(rank, world, store, queue):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), BatchNorm1d(3, activation="relu"))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    x = torch.randn(2 * world, 4, 5, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        ddp(x[2 * rank + step]).square().sum().backward()
    queue.put((rank, [p.grad.tolist() for p in model.parameters()], model[1].running_mean.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_ddp(tmp_path):
    """Gradients are averaged over ranks, and rank 0's buffers are everybody's at each forward."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (2, str(tmp_path / "store"), queue)
    torch.multiprocessing.spawn(ddp_rank, arguments, nprocs=2)
    results = {rank: rest for rank, *rest in (queue.get(), queue.get())}
    assert results[0][0] == results[1][0]

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), BatchNorm1d(3, activation="relu"))
    x = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(1))
    ranks = [copy.deepcopy(model) for _ in range(2)]
    for step in range(2):
        for rank, replica in enumerate(ranks):
            (replica(x[2 * rank + step]).square().sum() / 2).backward()
    summed = [a.grad + b.grad for a, b in zip(*(m.parameters() for m in ranks), strict=True)]
    for got, want in zip(results[0][0], summed, strict=True):
        same(torch.tensor(got), want, tolerances.LIKE_TORCH)
    same(torch.tensor(results[0][1]), ranks[0][1].running_mean, tolerances.LIKE_TORCH)
