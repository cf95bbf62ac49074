"""Each choice of statistics against brute force, one channel and one group at a time."""

import math
import pickle

import pytest
import torch
from tests import tolerances

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, Frozen, Ghost, Lp, Ramp, Renorm, Sync, functional

EPS = 1e-5


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).add(1).to(dtype)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def close(a, b, tolerance=tolerances.DOUBLE):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


class TestGhost:
    @pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
    @pytest.mark.parametrize(
        ("samples", "size", "groups"),
        [
            (8, 4, [4, 4]),
            (8, 8, [8]),
            (10, 4, [4, 6]),
            (11, 4, [4, 7]),
            (7, 4, [7]),
            (3, 1, [1, 1, 1]),
        ],
    )
    def test_groups_are_batches_of_their_own(self, samples, size, groups, layout):
        x, r = layout(draw(samples, 3, 2, 2)), draw(samples, 3, 2, 2, seed=3)
        w, b, dy = draw(3, seed=1), draw(3, seed=2), draw(samples, 3, 2, 2, seed=4)

        def ghost(x, w, b, r):
            return functional.ghost_batch_norm(x, size, w, b, residual=r, activation="relu").y

        def loop(x, w, b, r):
            parts = zip(x.split(groups), r.split(groups), strict=True)
            return torch.cat(
                [functional.batch_norm(p, w, b, residual=q, activation="relu").y for p, q in parts]
            )

        results = []
        for f in (ghost, loop):
            inputs = [t.clone().requires_grad_() for t in (x, w, b, r)]
            y = f(*inputs)
            results.append((y, *torch.autograd.grad(y, inputs, dy)))
        for got, want in zip(*results, strict=True):
            close(got, want)
        assert results[0][0].stride() == x.stride()

    @pytest.mark.parametrize("samples", [8, 11])
    def test_tracked_are_the_moments_of_the_whole_batch(self, samples):
        x = draw(samples, 3, 5)
        _, merged = functional.ghost_batch_norm(x, 4)
        whole = functional.moments(x)
        close(merged.mean, whole.mean)
        close(merged.var, whole.var)
        assert merged.n == whole.n

    def test_derivatives(self):
        x = draw(7, 2, 2).requires_grad_()

        def f(x):
            y, (mean, var, _) = functional.ghost_batch_norm(x, 2)
            return y, mean, var

        assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (x,))

    def test_evaluation_is_plain(self):
        x = draw(8, 3)
        plain, ghost = BatchNorm1d(3), BatchNorm1d(3, statistics=Ghost(2))
        for layer in (plain, ghost):
            layer(x)
            layer.eval()
        close(ghost(x), plain(x), tolerances.LIKE_TORCH)

    def test_what_is_wrong_is_named(self):
        with pytest.raises(ValueError, match=r"size must be from 1 to the 4 samples.*got 5"):
            functional.ghost_batch_norm(draw(4, 3), 5)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            functional.ghost_batch_norm(draw(4, 3), 1)
        with pytest.raises(ValueError, match="size must be 1 or more, got 0"):
            Ghost(0)
        layer = BatchNorm1d(3, statistics=Ghost(2))
        with pytest.raises(ValueError, match="mask cannot be used with Ghost"):
            layer(draw(4, 3, 5).float(), mask=torch.ones(4, 5, dtype=torch.bool))


class TestRenorm:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize(("r_max", "d_max"), [(3.0, 5.0), (1.05, 0.1), (1.0, 0.0)])
    def test_algorithm_1_channel_by_channel(self, r_max, d_max, masked):
        x, w, b = draw(6, 3, 5), draw(3, seed=1), draw(3, seed=2)
        running_mean, running_var = draw(3, seed=3), draw(3, seed=4).square()
        mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(5)) < 0.7
        if not masked:
            mask = torch.ones_like(mask)
        y, _ = functional.batch_renorm(
            *(x, running_mean, running_var, w, b),
            r_max=r_max,
            d_max=d_max,
            mask=mask if masked else None,
        )
        for c in range(3):
            kept = x[:, c][mask]
            mean, sigma = kept.mean().item(), math.sqrt(kept.var(correction=0).item() + EPS)
            of_running = math.sqrt(running_var[c].item() + EPS)
            r = min(max(sigma / of_running, 1 / r_max), r_max)
            d = min(max((mean - running_mean[c].item()) / of_running, -d_max), d_max)
            close(y[:, c], ((x[:, c] - mean) / sigma * r + d) * w[c] + b[c])

    def test_r_and_d_are_constants_for_the_gradient(self):
        x, dy = draw(6, 3, 5).requires_grad_(), draw(6, 3, 5, seed=1)
        running = torch.zeros(3), torch.full((3,), 2.0).double()
        y, (mean, var, _) = functional.batch_renorm(x, *running)
        r = ((var + EPS) / (running[1] + EPS)).sqrt().detach()
        d = ((mean - running[0]) / (running[1] + EPS).sqrt()).detach()
        by_hand = functional.batch_norm(x, r, d).y
        close(torch.autograd.grad(y, x, dy), torch.autograd.grad(by_hand, x, dy))
        tangent, expected = (
            torch.func.jvp(forward, (x.detach(),), (dy,))[1]
            for forward in (
                lambda x: functional.batch_renorm(x, *running).y,
                lambda x: functional.batch_norm(x, r, d).y,
            )
        )
        close(tangent, expected)

    def test_unclipped_training_is_evaluation(self):
        layer = BatchNorm1d(3, statistics=Renorm(r_max=100, d_max=100, schedule=None), momentum=0)
        x = draw(6, 3, 5, dtype=torch.float32)
        trained = layer(x)
        close(trained, layer.eval()(x), tolerances.LIKE_TORCH)

    def test_the_ramp_is_the_paper_s(self):
        ramp = Ramp()
        for batches, r, d in [(0, 1, 0), (5_000, 1, 0), (15_000, 1 + 4 / 7, 2.5), (50_000, 3, 5)]:
            close(
                torch.stack(ramp(torch.tensor(batches), 3.0, 5.0)),
                torch.tensor([r, d], dtype=torch.float64),
            )

    def test_the_schedule_follows_the_layer(self):
        x = draw(6, 3, dtype=torch.float32) + 3
        layer = BatchNorm1d(3, statistics=Renorm(schedule=Ramp(1, 2, 2)))
        plain = BatchNorm1d(3)
        close(layer(x), plain(x), tolerances.LIKE_TORCH)
        close(layer(x), plain(x), tolerances.LIKE_TORCH)
        assert (layer(x) - plain(x)).abs().max() > 0.1

    def test_what_is_wrong_is_named(self):
        with pytest.raises(ValueError, match=r"r_max must be 1 or more, got 0\.5"):
            Renorm(r_max=0.5)
        with pytest.raises(ValueError, match="d_max must be 0 or more, got nan"):
            Renorm(d_max=math.nan)
        with pytest.raises(ValueError, match="start must be from 0 to below"):
            Ramp(start=10, r_end=5)
        layer = BatchNorm1d(3, statistics=Renorm(), track_running_stats=False)
        with pytest.raises(ValueError, match="Renorm needs running statistics"):
            layer(torch.ones(4, 3))


class TestLp:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("central", [False, True])
    @pytest.mark.parametrize("p", [1, 2, 3.5, math.inf])
    def test_scale_channel_by_channel(self, p, central, masked):
        x = draw(6, 3, 5)
        mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(5)) < 0.7
        if not masked:
            mask = torch.ones_like(mask)
        y, (_, power, _) = functional.lp_batch_norm(
            x, p, central=central, mask=mask if masked else None
        )
        for c in range(3):
            kept = x[:, c][mask].tolist()
            mean = sum(kept) / len(kept)
            sizes = [abs(v - mean if central else v) for v in kept]
            scale = (
                max(sizes) if p == math.inf else (sum(s**p for s in sizes) / len(kept)) ** (1 / p)
            )
            assert power[c].item() == pytest.approx(scale**2, rel=tolerances.DOUBLE)
            close(y[:, c], (x[:, c] - mean) / math.sqrt(scale**2 + EPS))

    def test_central_2_is_batch_norm_and_raw_2_is_not(self):
        x = draw(6, 3, 5)
        plain = functional.batch_norm(x).y
        close(functional.lp_batch_norm(x, 2, central=True).y, plain)
        assert (functional.lp_batch_norm(x, 2).y - plain).abs().max() > 0.1

    @pytest.mark.parametrize("central", [False, True])
    @pytest.mark.parametrize("p", [1, 2, math.inf])
    def test_derivatives(self, p, central):
        inputs = [draw(4, 2, 3).requires_grad_(), draw(2, seed=1).requires_grad_()]
        f = lambda x, w: functional.lp_batch_norm(x, p, w, central=central).y  # noqa: E731
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, inputs)

    def test_what_is_wrong_is_named(self):
        for make in (lambda: Lp(0.5), lambda: functional.lp_batch_norm(draw(4, 3), 0.5)):
            with pytest.raises(ValueError, match=r"p must be 1 or more, got 0\.5"):
                make()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            functional.lp_batch_norm(draw(1, 3), 1)


class TestFrozen:
    def test_it_survives_train_and_leaves_the_affine_alone(self):
        layer = BatchNorm2d(3)
        x = draw(4, 3, 2, 2, dtype=torch.float32)
        layer(x)
        expected, before = layer.eval()(x), layer.running_var.clone()
        layer.statistics = Frozen()
        layer.train()
        y = layer(x)
        y.sum().backward()
        close(y, expected, 0)
        assert torch.equal(layer.running_var, before)
        assert layer.num_batches_tracked == 1
        assert layer.weight.grad is not None

    def test_one_sample_is_enough(self):
        assert BatchNorm1d(3, statistics=Frozen())(torch.ones(1, 3)).shape == (1, 3)

    def test_without_running_statistics_it_says_so(self):
        layer = BatchNorm1d(3, statistics=Frozen(), track_running_stats=False)
        with pytest.raises(ValueError, match="Frozen needs running statistics"):
            layer(torch.ones(4, 3))


VALUES = [
    Ghost(2),
    Renorm(),
    Renorm(schedule=None),
    Lp(1),
    Lp(math.inf, central=True),
    Frozen(),
    Sync(),
]


@pytest.mark.parametrize("statistics", VALUES, ids=repr)
def test_every_choice_is_a_value(statistics):
    layer = BatchNorm1d(3, statistics=statistics)
    assert pickle.loads(pickle.dumps(statistics)) == statistics
    assert f"statistics={statistics!r}" in repr(layer)
    assert list(layer.state_dict()) == list(torch.nn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize("statistics", VALUES, ids=repr)
def test_every_choice_takes_residual_activation_and_an_empty_batch(statistics):
    layer = BatchNorm1d(3, statistics=statistics, activation="relu")
    x, r = draw(6, 3, 5, dtype=torch.float32), draw(6, 3, 5, seed=1, dtype=torch.float32)
    apart = BatchNorm1d(3, statistics=statistics)
    close(layer(x, r), torch.relu(apart(x) + r), tolerances.LIKE_TORCH)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert layer(x[:0], r[:0]).shape == (0, 3, 5)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_all_public_choices_are_tested():
    offered = {
        name
        for name in batchnorm.__all__
        if isinstance(value := getattr(batchnorm, name), type)
        and issubclass(value, batchnorm.nn.Statistics)
    }
    assert offered == {type(value).__name__ for value in VALUES}
