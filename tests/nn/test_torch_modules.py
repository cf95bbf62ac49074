"""PyTorch's own module tests for batch norm, with our classes in place of torch's.

The cases, their options, inputs and expected errors are those of torch's data base
(``torch.testing._internal.common_modules``); the checks are those that torch's suite makes of
every module in it.
"""

import copy
import pickle
import warnings

import pytest
import torch
from tests import tolerances
from torch.testing._internal.common_utils import freeze_rng_state

import batchnorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch imports for its other modules
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

OURS = {
    getattr(torch.nn, name): getattr(batchnorm, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
}
DATA = [info for info in module_db if info.module_cls in OURS]
# The first of these types has float64 parameters and buffers as torch's suite expects them.
DTYPES = [torch.float64, torch.float32]


def cases():
    for info in DATA:
        for training in (True, False):
            for dtype in DTYPES:
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=False, training=training
                )
                for i, case in enumerate(inputs):
                    mode = "train" if training else "eval"
                    name = f"{info.name}-{case.desc or i}-{mode}-{str(dtype)[6:]}"
                    yield pytest.param(info, case, training, dtype, id=name)


@pytest.fixture
def tensors():
    """Draw the inputs of a case anew, the same every time."""

    def draw(info, case, training, dtype, requires_grad=False):
        with freeze_rng_state():
            torch.manual_seed(0)
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
            )
        (found,) = [c for c in inputs if c.desc == case.desc]
        return found.forward_input.args

    return draw


def build(info, case, training, dtype, ours=True):
    constructor = case.constructor_input
    cls = OURS[info.module_cls] if ours else info.module_cls
    return cls(*constructor.args, **constructor.kwargs).to(dtype).train(training)


def same(a, b, dtype):
    tolerance = tolerances.DOUBLE if dtype == torch.float64 else tolerances.LIKE_TORCH
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


every_case = pytest.mark.parametrize(("info", "case", "training", "dtype"), list(cases()))


def test_the_data_base_has_the_cases():
    assert len(DATA) == 3
    assert len(list(cases())) >= 3 * 7 * 4


@every_case
def test_forward_and_gradients_are_torch_s(info, case, training, dtype, tensors):
    results = []
    for ours in (True, False):
        module = build(info, case, training, dtype, ours)
        (x,) = tensors(info, case, training, dtype, requires_grad=True)
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.long)
    same(*results, dtype)


@every_case
def test_factory_arguments(info, case, training, dtype):
    constructor = case.constructor_input
    module = OURS[info.module_cls](
        *constructor.args, **constructor.kwargs, device="meta", dtype=dtype
    )
    for tensor in (*module.parameters(), *module.buffers()):
        assert tensor.is_meta
        assert tensor.dtype == (dtype if tensor.is_floating_point() else torch.long)


@every_case
def test_printing_and_pickling(info, case, training, dtype, tensors):
    module = build(info, case, training, dtype)
    (x,) = tensors(info, case, training, dtype)
    assert repr(module) == str(module)
    assert repr(module) == repr(build(info, case, training, dtype, ours=False))
    other = pickle.loads(pickle.dumps(module))
    assert torch.equal(module(x), other(x))


@pytest.mark.parametrize(
    ("info", "case", "training", "dtype"), [c for c in cases() if c.values[3] == torch.float64]
)
def test_gradients_by_finite_differences(info, case, training, dtype, tensors):
    module = build(info, case, training, dtype)
    (x,) = tensors(info, case, training, dtype, requires_grad=True)
    parameters = dict(module.named_parameters())
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def f(x, *values):
        state = dict(zip(parameters, values, strict=True))
        state |= {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(module, state, (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters.values()), fast_mode=True)


@every_case
def test_non_contiguous_inputs_and_gradients(info, case, training, dtype, tensors):
    (x,) = tensors(info, case, training, dtype)
    spread = torch.empty(*x.shape, 2, dtype=dtype).fill_(float("nan"))[..., 0].copy_(x)
    results = []
    for value in (x, spread):
        module = build(info, case, training, dtype)
        leaf = value.detach().requires_grad_()
        y = module(leaf)
        dy = torch.ones(y.shape[::-1], dtype=dtype).permute(*reversed(range(y.dim())))
        y.backward(dy)
        results.append([y.detach(), leaf.grad])
    assert results[0][0].numel() < 2 or not spread.is_contiguous()
    same(*results, dtype)


@every_case
def test_memory_format_is_kept(info, case, training, dtype, tensors):
    (x,) = tensors(info, case, training, dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for layout in {torch.contiguous_format, formats.get(x.dim(), torch.contiguous_format)}:
        module = build(info, case, training, dtype).to(memory_format=torch.contiguous_format)
        value = x.to(memory_format=layout, copy=True)
        y = module(value)
        assert y.is_contiguous(memory_format=layout)
        same(y, build(info, case, training, dtype)(x), dtype)


@every_case
def test_train_and_eval_differ_and_modes_are_as_asked(info, case, training, dtype, tensors):
    (x,) = tensors(info, case, training, dtype)
    module = build(info, case, training, dtype)
    assert module.training == training
    tracked = module.track_running_stats and x.numel()
    y = copy.deepcopy(module).train()(x)
    z = copy.deepcopy(module).eval()(x)
    assert torch.equal(y, z) != bool(tracked)


@every_case
def test_to_empty_and_state_dict(info, case, training, dtype, tensors):
    module = build(info, case, training, dtype)
    (x,) = tensors(info, case, training, dtype)
    module(x)
    constructor = case.constructor_input
    other = OURS[info.module_cls](
        *constructor.args, **constructor.kwargs, device="meta", dtype=dtype
    )
    other = other.to_empty(device="cpu").train(training)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    theirs = build(info, case, training, dtype, ours=False)
    theirs.load_state_dict(module.state_dict())
    same(theirs(x), module(x), dtype)


@pytest.mark.parametrize("info", DATA, ids=lambda info: info.name)
def test_errors_are_those_expected_of_torch_s(info):
    expected = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    )
    assert expected
    for error in expected:
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
        constructor, inputs = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        module = OURS[info.module_cls](*constructor.args, **constructor.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            module(*inputs.args, **inputs.kwargs)
