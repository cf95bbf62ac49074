"""Schema, fake, dispatch and derivative of each op agree, by torch's own check."""

import pytest
import torch
from torch.library import opcheck

OPS = torch.ops.batchnorm
EPS = 1e-5


def cases(shape, layout, dtype, activation, has_residual):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    channels = shape[1]
    x, dy, residual = (layout(draw(*shape, dtype=dtype)) for _ in range(3))
    weight, bias, mean = (draw(channels) for _ in range(3))
    var = draw(channels).abs()
    x.requires_grad_()
    weight.requires_grad_()
    if not has_residual:
        residual = None
    gate = OPS.training_forward(x, weight, bias, residual, EPS, activation)[3]
    saved = (None, gate) if gate.numel() else (residual, None)
    double = (mean.double(), var.double())
    return {
        "training_forward": (x, weight, bias, residual, EPS, activation),
        "training_backward": (dy, x, *double, weight, bias, *saved, EPS, activation),
        "moments": (x,),
        "normalize": (x, mean, var, weight, None, residual, EPS, activation),
        "backward_sums": (dy, x, *double, weight, bias, *saved, EPS, activation),
        "backward_apply": (dy, x, *double, weight, bias, mean.double(), None, EPS, activation),
    }


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def neither(x):
    return torch.stack([x, x], -1)[..., 0]


# opcheck costs half a second a call, so each choice is seen once rather than all with all.
@pytest.mark.parametrize(
    "case",
    [
        ((4, 3), torch.Tensor.contiguous, torch.float32, 0, False),
        ((2, 9, 3, 3), channels_last, torch.bfloat16, 1, True),
        ((2, 3, 5), neither, torch.float32, 4, True),
    ],
    ids=["plain", "gate", "smooth"],
)
@pytest.mark.parametrize(
    "name",
    [
        "training_forward",
        "training_backward",
        "moments",
        "normalize",
        "backward_sums",
        "backward_apply",
    ],
)
def test_opcheck(name, case):
    opcheck(getattr(OPS, name).default, cases(*case)[name])


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, neither])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 1, 1), (2, 1, 3), (2, 9, 3, 3)])
def test_fakes_have_the_shape_type_and_strides_of_the_result(shape, layout):
    for name, arguments in cases(shape, layout, torch.bfloat16, 1, True).items():
        op = getattr(OPS, name)
        fakes = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        results = op(*arguments)
        if isinstance(results, torch.Tensor):
            fakes, results = (fakes,), (results,)
        for fake, result in zip(fakes, results, strict=True):
            assert (fake.shape, fake.dtype) == (result.shape, result.dtype), name
            assert fake.is_contiguous() == result.is_contiguous(), name
