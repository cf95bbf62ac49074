"""The running statistics of the compiled op against the reference's, in float64."""

import pytest
import torch
from tests import tolerances
from tests.device import DEVICE

from batchnorm import ops
from batchnorm.ops import reference

CHANNELS = 37


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_the_reference(dtype, momentum, strided):
    torch.manual_seed(0)
    every = 2 if strided else 1
    running = [torch.rand(CHANNELS * every, dtype=dtype, device=DEVICE)[::every] for _ in range(2)]
    mean, var = (torch.rand(CHANNELS, device=DEVICE).double() for _ in range(2))
    count = torch.tensor(4, device=DEVICE)
    wide, wide_count = [r.double() for r in running], count.clone()
    reference.update_running(*wide, wide_count, mean, var, 6.0, momentum)
    ops.update_running(*running, count, mean, var, 6, momentum)
    assert count == wide_count == 5
    for got, want in zip(running, wide, strict=True):
        bound = tolerances.DOUBLE if dtype == torch.float64 else tolerances.ROUNDED_ONCE
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


def test_autograd_notices_statistics_that_it_saved():
    x = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    y = ops.normalize(x, mean, var, None, None, None, 1e-5, 0)
    batch = torch.ones(3, device=DEVICE).double()
    ops.update_running(mean, var, None, batch, batch, 4, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
