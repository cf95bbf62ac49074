"""The compiled calls against Python's: the same bits, the same graph, and who declines what."""

import gc
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tests import tolerances
from tests.device import DEVICE
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from batchnorm import kernels, ops
from batchnorm.ops import active, autograd

EPS = 1e-5
NONE, RELU, GELU = (ops.ACTIVATIONS.index(name) for name in ("none", "relu", "gelu"))
compiled = active.compiled_calls
needs_compiled = pytest.mark.skipif(compiled is None, reason=ops.kernels()["autograd"])


@pytest.mark.skipif("BATCHNORM_AUTOGRAD" in os.environ, reason="Python's were asked for")
def test_the_compiled_calls_are_used():
    assert ops.kernels()["autograd"] == f"compiled (torch {torch.__version__})"
    assert type(ops.training_forward(*inputs(), EPS, RELU)[0].grad_fn).__name__ == "CppFunction"


@contextmanager
def by_python():
    with pytest.MonkeyPatch.context() as patch:
        for op in (autograd.training_forward, autograd.normalize):
            patch.setattr(op, "_compiled", autograd._decline)
        patch.setattr(autograd, "_update_running", autograd._decline)
        yield


def both(f):
    got = f()
    with by_python():
        want = f()
    return got, want


def same(got, want, tolerance=0.0):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(residual=True, affine="weight, bias", dtype=torch.float64):
    given = {"weight": draw(3, seed=1), "bias": draw(3, seed=2)}
    made = [draw(4, 3, 5, dtype=dtype)]
    made += [given[name].to(dtype) if name in affine else None for name in given]
    made.append(draw(4, 3, 5, seed=3, dtype=dtype) if residual else None)
    return [None if t is None else t.requires_grad_() for t in made]


def gradients(y, mean, var, watched, through="y, mean, var", create_graph=False):
    """Of a sum that weighs every value of the outputs named, of each of the inputs."""
    named = {"y": y, "mean": mean, "var": var}
    chosen = [named[name] for name in named if name in through]
    weights = [draw(*t.shape, seed=7 + i, dtype=t.dtype) for i, t in enumerate(chosen)]
    return torch.autograd.grad(
        chosen, watched, weights, create_graph=create_graph, allow_unused=True
    )


@needs_compiled
@pytest.mark.parametrize("through", ["y", "mean", "var", "mean, var", "y, mean, var"])
@pytest.mark.parametrize("affine", ["weight, bias", "weight", "bias", ""])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [NONE, RELU, GELU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits(dtype, activation, residual, affine, through):
    arguments = inputs(residual, affine, dtype)

    def run():
        results = ops.training_forward(*arguments, EPS, activation)
        watched = [t for t in arguments if t is not None]
        return results, gradients(*results[:3], watched, through)

    (results, got), (expected, want) = both(run)
    assert type(results) is type(expected) is tuple
    assert [t.requires_grad for t in results] == [True, True, True, False]
    same(results, expected)
    assert [t is None for t in got] == [t is None for t in want]
    same([t for t in got if t is not None], [t for t in want if t is not None])


@needs_compiled
@pytest.mark.parametrize("watched", range(4))
def test_one_input_is_enough(watched):
    arguments = [t.detach() for t in inputs()]
    arguments[watched].requires_grad_()

    def run():
        results = ops.training_forward(*arguments, EPS, GELU)[:3]
        return gradients(*results, arguments[watched])

    same(*both(run))


@needs_compiled
@pytest.mark.parametrize("through", ["y", "mean, var", "y, mean, var"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [NONE, RELU, GELU])
def test_second_derivatives(activation, residual, through):
    """That they are right is what test_autograd says; here that they are Python's."""
    arguments = inputs(residual)
    watched = [t for t in arguments if t is not None]

    def run():
        results = ops.training_forward(*arguments, EPS, activation)[:3]
        first = gradients(*results, watched, through, create_graph=True)
        total = sum(t.sin().sum() for t in first if t is not None and t.requires_grad)
        return torch.autograd.grad(total, watched, allow_unused=True, materialize_grads=True)

    same(*both(run), tolerances.DOUBLE)


@needs_compiled
def test_forward_mode_over_a_graph_that_was_there():
    arguments = inputs()
    y, tangent = ops.training_forward(*arguments, EPS, GELU)[0], draw(4, 3, 5, seed=8)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), tangent)
        grads = torch.autograd.grad(y, arguments, dy, retain_graph=True)
        got = [forward_ad.unpack_dual(t).tangent for t in grads]
    # Backward is linear in dy.
    same(got, list(torch.autograd.grad(y, arguments, tangent)), tolerances.DOUBLE)


@needs_compiled
@pytest.mark.parametrize("changed", range(4))
def test_autograd_notices_what_changed_since(changed):
    """The bias is read again by backward, for the sign of z, and so is the residual, for gelu."""
    arguments = inputs()
    y = ops.training_forward(*arguments, EPS, GELU)[0]
    arguments[changed].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_compiled
def test_backward_twice():
    x, *others = inputs()
    y = ops.training_forward(x, *others, EPS, RELU)[0]
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=keep) for keep in (True, False))
    same(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@needs_compiled
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [NONE, RELU, GELU])
def test_saved_tensors_go_through_hooks(activation, residual):
    arguments = inputs(residual)
    watched = [t for t in arguments if t is not None]

    def run():
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.detach().clone()) or len(packed) - 1, lambda i: packed[i]
        ):
            y = ops.training_forward(*arguments, EPS, activation)[0]
        return packed, torch.autograd.grad(y.sin().sum(), watched)

    same(*both(run))


@needs_compiled
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    arguments = inputs()

    def forward(*t):
        return ops.training_forward(*t, EPS, RELU)[0].sin()

    def run(f):
        (f(*arguments) * draw(4, 3, 5, seed=7)).sum().backward()
        found = [t.grad for t in arguments]
        for t in arguments:
            t.grad = None
        return found

    again = run(lambda *t: checkpoint(forward, *t, use_reentrant=use_reentrant))
    same(again, run(forward))


class Heard(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_compiled
def test_a_dispatch_mode_hears_the_same_ops():
    arguments = inputs()

    def run():
        with Heard() as heard:
            y, mean, var, _ = ops.training_forward(*arguments, EPS, RELU)
            gradients(y, mean, var, arguments)
            vector = mean.detach(), var.detach()
            ops.update_running(*vector, None, *vector, 20, 0.1)
            with torch.no_grad():
                ops.normalize(arguments[0], *vector, *arguments[1:], EPS, RELU)
        return [name for name in heard.ops if name.startswith("batchnorm.")]

    got, want = both(run)
    expected = ("training_forward", "training_backward", "normalize", "update_running", "normalize")
    assert got == want == [f"batchnorm.{name}.default" for name in expected]


@needs_compiled
def test_fake_tensors_inside_a_mode():
    """They are a subclass, which is declined; the mode itself sees plain ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = [t.detach() for t in inputs()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for given in (arguments, [torch.empty_like(t) for t in arguments]):
            y, mean, _, gate = ops.training_forward(*given, EPS, RELU)
            assert (y.shape, mean.shape, gate.shape) == ((4, 3, 5), (3,), (4, 2))
    y = ops.training_forward(*arguments, EPS, RELU)[0]
    assert type(y) is torch.Tensor


class Subclass(torch.Tensor):
    pass


def plain_calls():
    x, weight, bias, residual = (t.detach() for t in inputs())
    vectors = draw(3, seed=4), draw(3, seed=5).abs() + 1
    return {
        "training_forward": [x, weight, bias, residual, EPS, RELU],
        "normalize": [x, *vectors, weight, bias, residual, EPS, RELU],
        "update_running": [*vectors, torch.tensor(0, device=DEVICE), *vectors, 20, 0.1],
    }


@needs_compiled
@pytest.mark.parametrize("name", plain_calls())
def test_what_is_not_plain_is_declined(name):
    call, arguments = getattr(compiled, name), plain_calls()[name]
    assert call(*arguments) is not NotImplemented
    others = {
        torch.Tensor: lambda t: [t.as_subclass(Subclass), t.tolist()],
        float: lambda v: [np.float64(v), torch.tensor(v), str(v), True],
        int: lambda v: [np.int64(v), torch.tensor(v), str(v), True],
    }
    for i, value in enumerate(arguments):
        for other in others[type(value)](value):
            given = [*arguments[:i], other, *arguments[i + 1 :]]
            assert call(*given) is NotImplemented, (i, other)
    assert call() is call(*arguments[:-1]) is call(*arguments, None) is NotImplemented
    assert call(None, *arguments[1:]) is NotImplemented
    with TorchFunctionMode():
        assert call(*arguments) is NotImplemented


@needs_compiled
def test_normalize_leaves_gradients_to_python():
    x, *others = plain_calls()["normalize"]
    x.requires_grad_()
    assert compiled.normalize(x, *others) is NotImplemented
    with torch.no_grad():
        y = compiled.normalize(x, *others)
    assert not y.requires_grad
    same(y, ops.normalize(x, *others).detach())


@needs_compiled
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
def test_a_trace_has_the_ops():
    """torch.jit records what Python calls, and would keep anything else as a constant."""
    x, *others = plain_calls()["normalize"]
    traced = torch.jit.trace(lambda x: ops.normalize(x, *others), x)
    same(traced(x.sin()), ops.normalize(x.sin(), *others))


@needs_compiled
def test_whoever_overrides_torch_functions_is_asked():
    arguments, asked = plain_calls()["training_forward"], []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    ops.training_forward(arguments[0].as_subclass(Asked), *arguments[1:])
    assert "batchnorm.training_forward.default" in asked


@needs_compiled
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_kept(backward):
    arguments = inputs()
    outputs = ops.training_forward(*arguments, EPS, GELU)
    kept = [weakref.ref(t) for t in (*arguments, *outputs)]
    gc.disable()
    try:
        if backward:
            outputs[0].sum().backward()
        del arguments, outputs
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


@needs_compiled
def test_the_running_statistics_have_a_new_version():
    mean, var, count, *others = plain_calls()["update_running"]
    running, before = (mean.clone(), var.clone()), mean.clone()._version
    assert compiled.update_running(*running, count, *others) is None
    assert all(t._version > before for t in running)
    with torch.inference_mode():  # where tensors have no version
        compiled.update_running(mean.clone(), var.clone(), None, *others)


@needs_compiled
@pytest.mark.parametrize("momentum", [0.1, 1, None])
def test_the_same_running_statistics(momentum):
    running_mean, running_var, count, mean, var, n, _ = plain_calls()["update_running"]

    def run():
        running = running_mean.clone(), running_var.clone(), count.clone()
        ops.update_running(*running, mean, var, n, momentum)
        return running

    same(*both(run))


@needs_compiled
def test_errors_are_those_of_the_op():
    x = torch.ones(4, 3, dtype=torch.int64, device=DEVICE)

    def run():
        with pytest.raises(RuntimeError) as caught:
            ops.training_forward(x, None, None, None, EPS, NONE)
        return str(caught.value)

    got, want = both(run)
    assert got == want


@needs_compiled
def test_another_torch_is_refused(monkeypatch):
    built_for = torch.__version__
    monkeypatch.delenv("BATCHNORM_AUTOGRAD", raising=False)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ImportError, match="built for torch") as caught:
        kernels.load_autograd()
    assert str(caught.value) == f"built for torch {built_for}, this is 9.9"


def test_switched_off():
    code = (
        "import torch, batchnorm.ops as o; print(o.kernels()['autograd']);"
        "x = torch.ones(4, 3, requires_grad=True);"
        "print(o.training_forward(x, None, None, None, 0.1, 0)[0].grad_fn.name())"
    )
    environment = {**os.environ, "BATCHNORM_AUTOGRAD": "python"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    said, node = done.stdout.splitlines()
    assert said == "Python (BATCHNORM_AUTOGRAD=python)"
    assert node == "_TrainingForwardBackward"
