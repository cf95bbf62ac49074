"""Running statistics that cannot go wrong silently."""

import copy
import pickle
import warnings

import pytest
import torch
from tests import tolerances
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNorm1d, Guard


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_updates_once(use_reentrant, momentum):
    x = draw(8, 3)
    plain, saved = BatchNorm1d(3, momentum=momentum), BatchNorm1d(3, momentum=momentum)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for _ in range(2):
        plain(inputs[0]).square().sum().backward()
        checkpoint(saved, inputs[1], use_reentrant=use_reentrant).square().sum().backward()
    assert saved.num_batches_tracked == 2
    for name, value in plain.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_a_layer_between_two_backwards_still_counts():
    layer = BatchNorm1d(3)
    x = draw(8, 3).requires_grad_()
    layer(x).sum().backward()
    layer(x).sum().backward()
    assert layer.num_batches_tracked == 2


class TestGuard:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_non_finite_updates_are_refused(self, bad):
        """1e30 is finite, but the variance is not as float32."""
        layer = BatchNorm1d(3, guard=Guard())
        layer(draw(8, 3))
        before = copy.deepcopy(layer.state_dict())
        x = draw(8, 3)
        x[2, 1] = bad
        with pytest.warns(RuntimeWarning, match="BatchNorm1d.*refused an update"):
            layer(x)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_finite_updates_pass(self):
        guarded, plain = BatchNorm1d(3, guard=Guard()), BatchNorm1d(3)
        for layer in (guarded, plain):
            layer(draw(8, 3))
        assert torch.equal(guarded.running_var, plain.running_var)

    def test_compiled_code_refuses_too(self):
        torch._dynamo.reset()
        layer = BatchNorm1d(3, guard=Guard())
        layer(draw(8, 3))
        before = layer.running_mean.clone(), layer.running_var.clone()
        x = draw(8, 3)
        x[2, 1] = float("nan")
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(
            (layer.running_mean, layer.running_var), before, rtol=tolerances.LIKE_TORCH, atol=0
        )

    def test_training_without_gradients_is_told(self):
        layer = BatchNorm1d(3, guard=Guard())
        with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"no_grad.*call eval\(\)"):
            layer(draw(8, 3))
        layer.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(draw(8, 3))

    def test_each_part_can_be_left_out(self):
        layer = BatchNorm1d(3, guard=Guard(non_finite=False, no_grad=False))
        with torch.no_grad():
            layer(draw(8, 3) * float("nan"))
        assert layer.running_mean.isnan().all()

    def test_it_prints_and_pickles(self):
        layer = BatchNorm1d(3, guard=Guard(no_grad=False))
        assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)
        assert "guard=Guard(non_finite=True, no_grad=False)" in repr(layer)


LAZY = {
    batchnorm.LazyBatchNorm1d: (batchnorm.BatchNorm1d, torch.nn.LazyBatchNorm1d, (8, 3)),
    batchnorm.LazyBatchNorm2d: (batchnorm.BatchNorm2d, torch.nn.LazyBatchNorm2d, (4, 3, 2, 2)),
    batchnorm.LazyBatchNorm3d: (batchnorm.BatchNorm3d, torch.nn.LazyBatchNorm3d, (4, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("lazy", LAZY, ids=lambda cls: cls.__name__)
class TestLazy:
    def test_it_becomes_the_layer(self, lazy):
        becomes, theirs, shape = LAZY[lazy]
        layer = lazy(1e-3, None, activation="relu", statistics=batchnorm.Ghost(2), guard=Guard())
        assert isinstance(layer, theirs)
        eager = becomes(
            3, 1e-3, None, activation="relu", statistics=batchnorm.Ghost(2), guard=Guard()
        )
        x = draw(*shape)
        assert torch.equal(layer(x), eager(x))
        assert type(layer) is becomes
        assert repr(layer) == repr(eager)
        for name, value in eager.state_dict().items():
            assert torch.equal(value, layer.state_dict()[name]), name

    def test_statistics_are_float32_from_the_start(self, lazy):
        _, _, shape = LAZY[lazy]
        layer = lazy(dtype=torch.bfloat16)
        layer(draw(*shape).bfloat16())
        assert layer.weight.dtype == torch.bfloat16
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32

    def test_options_are_kept(self, lazy):
        becomes, _, shape = LAZY[lazy]
        for options in ({"bias": False}, {"affine": False}, {"track_running_stats": False}):
            layer, eager = lazy(**options), becomes(3, **options)
            layer(draw(*shape))
            assert repr(layer) == repr(eager)
            assert list(layer.state_dict()) == list(eager.state_dict())

    def test_a_wrong_rank_is_named(self, lazy):
        with pytest.raises(ValueError, match=r"expected .*D input"):
            lazy()(torch.ones(3))
