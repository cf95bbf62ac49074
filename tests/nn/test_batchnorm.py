"""The modules against torch's, which they stand in for."""

import copy
import pickle

import pytest
import torch
from tests import tolerances

import batchnorm

PAIRS = {
    "1d": (batchnorm.BatchNorm1d, torch.nn.BatchNorm1d, (6, 3)),
    "1d sequence": (batchnorm.BatchNorm1d, torch.nn.BatchNorm1d, (4, 3, 5)),
    "2d": (batchnorm.BatchNorm2d, torch.nn.BatchNorm2d, (4, 3, 5, 6)),
    "3d": (batchnorm.BatchNorm3d, torch.nn.BatchNorm3d, (2, 3, 4, 3, 2)),
}
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "fast": {"momentum": 0.5, "eps": 1e-2},
    "still": {"momentum": 0.0},
    "plain": {"affine": False},
    "no bias": {"bias": False},
    "untracked": {"track_running_stats": False},
}


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 2 + 1


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_then_evaluation_is_torch(pair, options, dtype):
    ours, theirs, shape = pair
    layers = [cls(3, **OPTIONS[options], dtype=dtype) for cls in (ours, theirs)]
    tolerance = tolerances.DOUBLE if dtype == torch.float64 else tolerances.LIKE_TORCH
    state = {
        name: draw(*value.shape, seed=9, dtype=dtype)
        for name, value in layers[0].named_parameters()
    }
    for layer in layers:
        layer.load_state_dict(state, strict=False)
    for training in (True, True, False):
        results = []
        for layer in layers:
            layer.train(training).zero_grad()
            x = draw(*shape, seed=int(training), dtype=dtype).requires_grad_()
            y = layer(x)
            y.backward(draw(*shape, seed=2, dtype=dtype))
            gradients = {name: p.grad for name, p in layer.named_parameters()}
            results.append({"y": y, "x": x.grad, **gradients, **dict(layer.named_buffers())})
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_state_dicts_are_interchangeable(pair):
    ours, theirs, shape = pair
    a, b = ours(3), theirs(3)
    a(draw(*shape))
    assert list(a.state_dict()) == list(b.state_dict())
    b.load_state_dict(a.state_dict())
    c = ours(3)
    c.load_state_dict(b.state_dict())
    for name, value in c.state_dict().items():
        assert torch.equal(value, a.state_dict()[name])


def test_it_is_found_by_those_who_look_for_torch_s(pair):
    ours, theirs, _ = pair
    assert isinstance(ours(3), theirs)
    assert isinstance(ours(3), torch.nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    "narrow",
    [
        lambda layer: layer.bfloat16(),
        lambda layer: layer.half(),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: batchnorm.BatchNorm1d(3, dtype=torch.bfloat16),
        lambda layer: copy.deepcopy(layer.bfloat16()),
    ],
)
def test_running_statistics_stay_float32(narrow):
    layer = narrow(batchnorm.BatchNorm1d(3))
    assert layer.weight.dtype.itemsize == 2
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_narrowing_keeps_every_digit_of_the_running_statistics():
    layer = batchnorm.BatchNorm1d(3)
    layer(draw(8, 3))
    before = layer.running_mean.clone()
    assert torch.equal(layer.bfloat16().running_mean, before)


def test_loading_narrow_statistics_widens_them():
    narrow = torch.nn.BatchNorm1d(3).bfloat16()
    layer = batchnorm.BatchNorm1d(3)
    layer.load_state_dict(narrow.state_dict(), assign=True)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_double_widens_and_float_comes_back():
    layer = batchnorm.BatchNorm1d(3).double()
    assert layer.running_mean.dtype == torch.float64
    assert layer.float().running_mean.dtype == torch.float32


def test_a_bfloat16_model_follows_its_data():
    """Where torch's bfloat16 running mean stalls at a third of the way."""
    x = draw(64, 3, dtype=torch.bfloat16) + 2
    layers = [
        cls(3, momentum=0.001).bfloat16() for cls in (batchnorm.BatchNorm1d, torch.nn.BatchNorm1d)
    ]
    with torch.no_grad():
        for _ in range(5000):
            for layer in layers:
                layer(x)
    true = x.float().mean(0)
    share = [(layer.running_mean.float() / true).mean().item() for layer in layers]
    assert share[0] > 0.99
    assert share[1] < 0.5


def test_residual_activation_and_repr(pair):
    ours, theirs, shape = pair
    layer = ours(3, activation="relu")
    x, r = draw(*shape), draw(*shape, seed=1)
    expected = torch.relu(theirs(3)(x) + r)
    torch.testing.assert_close(
        layer(x, r), expected, rtol=tolerances.LIKE_TORCH, atol=tolerances.LIKE_TORCH
    )
    assert repr(layer).endswith("track_running_stats=True, activation='relu')")
    assert repr(ours(3)) == repr(theirs(3))


def test_copies_are_whole(pair):
    ours, _, shape = pair
    layer = ours(3, activation="silu", momentum=None)
    layer(draw(*shape))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer)
        assert torch.equal(other(draw(*shape)), layer(draw(*shape)))
        assert torch.equal(other.running_var, layer.running_var)


def test_mask_reaches_the_running_statistics():
    x = draw(4, 3, 5)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    layer = batchnorm.BatchNorm1d(3, momentum=1.0)
    layer(x.masked_fill(~mask.unsqueeze(1), 1e6), mask=mask)
    kept = x.movedim(1, -1)[mask]
    for buffer, expected in ((layer.running_mean, kept.mean(0)), (layer.running_var, kept.var(0))):
        torch.testing.assert_close(buffer, expected, rtol=tolerances.LIKE_TORCH, atol=0)


def test_evaluation_takes_one_sample(pair):
    ours, _, shape = pair
    assert ours(3).eval()(draw(*shape)[:1]).shape[0] == 1


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_is_empty_and_leaves_no_trace(pair, training):
    ours, _, shape = pair
    layer = ours(3, momentum=None, activation="relu").train(training)
    x = draw(*shape)[:0].requires_grad_()
    y = layer(x, x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_a_negative_eps_is_named_where_torch_names_it():
    with pytest.raises(ValueError, match="eps must be positive"):
        batchnorm.BatchNorm1d(3, eps=-1.0)(draw(4, 3))


def test_a_failed_call_leaves_no_trace():
    layer = batchnorm.BatchNorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.ones(1, 3))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": -1}, "num_features must not be negative, got -1"),
        ({"eps": float("inf")}, "eps must be positive .* got inf"),
        ({"momentum": float("nan")}, "momentum must be in .* got nan; .*Keras"),
        ({"momentum": 1.5}, "momentum must be in .* got 1.5"),
        ({"activation": "swish"}, "activation must be None or one of relu.*got 'swish'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        batchnorm.BatchNorm2d(**{"num_features": 3, **options})


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (batchnorm.BatchNorm1d, (3, 3, 3, 3), r"expected 2D or 3D input, .*got 4D of shape \(3,"),
        (batchnorm.BatchNorm2d, (3, 3), r"expected 4D input, \(N, C, H, W\), got 2D"),
        (batchnorm.BatchNorm3d, (3, 3, 3, 3), "expected 5D input"),
        (batchnorm.BatchNorm1d, (4, 5), "weight must have one value for each of the 5 channels"),
    ],
)
def test_wrong_shapes_are_named(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(3)(torch.ones(shape))
