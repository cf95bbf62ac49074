"""Derivatives of every op, of first and second order, forward and reverse, batched or not."""

import pytest
import torch
from tests import tolerances
from tests.device import DEVICE, INTERPRETED
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from batchnorm import ops
from batchnorm.ops import reference

EPS = 1e-5
CODES = range(len(ops.ACTIVATIONS))


def draw(*shape, seed=0, requires_grad=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    return x.requires_grad_(requires_grad)


def inputs(has_residual, requires_grad=True):
    x = draw(4, 3, 2, requires_grad=requires_grad)
    weight, bias = (draw(3, seed=seed, requires_grad=requires_grad) for seed in (1, 2))
    residual = draw(4, 3, 2, seed=3, requires_grad=requires_grad) if has_residual else None
    return x, weight, bias, residual


def check(f, arguments):
    assert torch.autograd.gradcheck(f, arguments, check_forward_ad=True, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(f, arguments, fast_mode=INTERPRETED)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", CODES)
def test_training(activation, has_residual):
    """Of y, mean and var alike."""
    check(lambda *t: ops.training_forward(*t, EPS, activation)[:3], inputs(has_residual))


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", CODES)
def test_normalize(activation, has_residual):
    x, weight, bias, residual = inputs(has_residual)
    mean, var = draw(3, seed=4), draw(3, seed=5).detach().square().add(0.1).requires_grad_()
    check(lambda *t: ops.normalize(*t, EPS, activation), (x, mean, var, weight, bias, residual))


def test_pieces():
    x, weight, bias, _ = inputs(False)
    dy, mean, var = draw(4, 3, 2, seed=6), draw(3, seed=4), (draw(3, seed=5).abs() + 1).detach()
    check(ops.moments, (x,))
    given = (dy, x, mean, var.requires_grad_(), weight, bias)
    check(lambda *t: ops.backward_sums(*t, None, None, EPS, 4)[:2], given)
    check(lambda *t: ops.backward_apply(*t, EPS, 4), (*given, draw(3, seed=7), draw(3, seed=8)))
    check(lambda *t: ops.training_backward(*t, None, None, EPS, 4)[:1], given)


@pytest.mark.parametrize("name", ["training_forward", "moments"])
def test_the_registered_op_is_differentiable_too(name):
    op = getattr(torch.ops.batchnorm, name)
    arguments = (*inputs(True), EPS, 1) if name == "training_forward" else (draw(4, 3, 2),)
    direct = getattr(ops, name)(*arguments)
    through = op(*arguments)
    for a, b in zip(through, direct, strict=True):
        if a.requires_grad:
            got = torch.autograd.grad(a.sum(), arguments[0], retain_graph=True)
            want = torch.autograd.grad(b.sum(), arguments[0], retain_graph=True)
            torch.testing.assert_close(got, want, rtol=0, atol=tolerances.DOUBLE)


TRANSFORMS = {
    "grad": lambda f, x, w: grad(f, (0, 1))(x, w),
    "grad of grad": lambda f, x, w: grad(lambda x: grad(f, 1)(x, w).sin().sum())(x),
    "vmap": lambda f, x, w: vmap(f, (0, None))(torch.stack([x, x.exp()]), w),
    "vmap of grad": lambda f, x, w: vmap(grad(f), (None, 0))(x, torch.stack([w, w.exp()])),
    "grad of vmap": lambda f, x, w: grad(
        lambda x: vmap(f, (1, None))(torch.stack([x, x.exp()], 1), w).sum()
    )(x),
    "jacrev": lambda f, x, w: jacrev(f)(x, w),
    "jacfwd": lambda f, x, w: jacfwd(f)(x, w),
    "jvp": lambda f, x, w: jvp(f, (x, w), (x.cos(), w)),
    # torch's own batch norm loses the outer tangent here (pytorch#196699).
    "jvp of jvp": lambda f, x, w: jvp(
        lambda x: jvp(lambda x: f(x, w), (x,), (x.cos(),))[1], (x,), (x.sin(),)
    ),
    "hessian": lambda f, x, w: hessian(f)(x, w),
}


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [0, 1, 4])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_agrees_with_plain_operations(transform, activation, has_residual):
    x, weight, bias, residual = inputs(has_residual, requires_grad=False)

    def scalar(forward):
        def f(x, w):
            y, mean, var, _ = forward(x, w, bias, residual, EPS, activation)
            return y.sin().square().sum() + mean.pow(3).sum() + var.sin().sum()

        return f

    got = TRANSFORMS[transform](scalar(ops.training_forward), x, weight)
    want = TRANSFORMS[transform](scalar(reference.training_forward), x, weight)
    torch.testing.assert_close(got, want, rtol=tolerances.DOUBLE, atol=tolerances.DOUBLE)


@pytest.mark.parametrize("batched", ["x", "residual", "both"])
@pytest.mark.parametrize("activation", [0, 1, 4])
def test_batching_is_a_loop(activation, batched):
    """Including the packed gate, whose bits are another order in a batch."""
    x, weight, bias, residual = inputs(True, requires_grad=False)
    xs, residuals = torch.stack([x, x.exp(), x.sin()]), torch.stack([residual, -residual, x])
    dims = (0 if batched != "residual" else None, 0 if batched != "x" else None)
    first, second = (xs if dims[0] == 0 else x), (residuals if dims[1] == 0 else residual)

    def step(x, residual):
        y, mean, var, gate = torch.ops.batchnorm.training_forward(
            x, weight, bias, residual, EPS, activation
        )
        saved = (None, gate) if gate.numel() else (residual, None)
        return (
            y,
            gate,
            *torch.ops.batchnorm.training_backward(
                y, x, mean, var, weight, bias, *saved, EPS, activation
            ),
        )

    got = vmap(step, dims)(first, second)
    for i in range(3):
        want = step(xs[i] if dims[0] == 0 else x, residuals[i] if dims[1] == 0 else residual)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[i], b, rtol=0, atol=tolerances.DOUBLE)
