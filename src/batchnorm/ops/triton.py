"""The ops of :mod:`batchnorm.ops` by Triton: what to allocate, which kernels to launch.

Forward and backward take two launches, partial results and what follows from them, or one where
the activation fits on the chip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from batchnorm.kernels.triton import cut, on_chip, streaming
from batchnorm.kernels.triton.cut import Cut, View
from batchnorm.ops.reference import (
    NONE,
    SHORT_RUN,
    STATISTICS_DTYPE,
    check_gate,
    compute_dtype,
    dense,
    gate_rows,
    is_channels_last,
    laid_out_as,
    uses_gate,
)

INTERPRETED = triton.knobs.runtime.interpret
# Enough for the interpreter, whose programs run one after another, to share a channel.
INTERPRETED_PROCESSORS = 2

STREAMING_WARPS = 4
CHANNELS = 64  # of a program that only merges
UPDATED = 1024  # channels at a time

_T = {torch.float32: tl.float32, torch.float64: tl.float64}

# Devices that refused a cooperative launch are not asked again.
_refused: set[torch.device] = set()


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _dense(x: Tensor) -> Tensor:
    if x.dim() < 2 or not x.numel():
        raise RuntimeError("batchnorm: x must have two or more axes and not be empty")
    return dense(x)


def _view(x: Tensor) -> View:
    """See a dense tensor as planes or columns."""
    n, c, s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if s == 1 or is_channels_last(x):
        return View(False, n * s, c, c)
    if s < SHORT_RUN:
        return View(False, n, c * s, c, s)
    return View(True, n, s, c)


def _on(x: Tensor) -> Any:
    """Make the device of x the current one, which Triton launches on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _launch(kernel: Any, programs: int, **args: Any) -> None:
    # The interpreter calculates with numpy, which a device would not warn of masked values.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext():
        # Versions differ in whether they fuse by themselves, and so in the rounding.
        kernel[(programs,)](**args, enable_fp_fusion=True)


def _geometry(c: Cut, x: Tensor) -> dict[str, Any]:
    view = c.view
    align = next(a for a in (16, 8, 4, 2, 1) if view.cols % a == 0)
    return {
        "rows": view.rows,
        "units": view.cols // align,
        "channels": view.channels,
        "parts": c.parts,
        "PLANES": view.planes,
        "ALIGN": align,
        "ROWS": c.rows,
        "COLS": c.cols,
        "T": _T[compute_dtype(x)],
    }


def _streaming(c: Cut, x: Tensor) -> dict[str, Any]:
    return {**_geometry(c, x), "RUN": c.view.run, "num_warps": STREAMING_WARPS}


def _cooperate(kernel: Any, programs: int, **args: Any) -> None:
    """Launch programs that meet, all of which must be resident."""
    if not INTERPRETED:
        _launch(kernel, programs, MEET=True, launch_cooperative_grid=True, **args)
        return
    # Programs run one after another: in a second run all find what the first left.
    for _ in range(2):
        _launch(kernel, programs, MEET=False, **args)


def _one_launch(kernel: Any, c: Cut, **args: Any) -> bool:
    """Launch a kernel that holds its tiles; return whether the device accepted."""
    x = args["x"]
    args |= _geometry(c, x)
    args["num_warps"] = min(max(c.rows * c.cols // cut.ELEMENTS_PER_WARP, 4), 16)
    if c.parts == 1:
        _launch(kernel, c.programs, barrier=None, MEET=False, **args)
        return True
    # New each time: no two launches that run at once may share it, nor graphs in which they are.
    barrier = torch.zeros(1, dtype=torch.int32, device=x.device)
    try:
        _cooperate(kernel, c.programs, barrier=barrier, **args)
    except RuntimeError as error:
        if "cooperative" not in str(error):
            raise
        _refused.add(x.device)
        return False
    return True


def _streamed(view: View, x: Tensor) -> Cut:
    return cut.streamed(view, x.element_size(), _processors(x.device))


def _held(view: View, x: Tensor, tensors: int) -> Cut | None:
    c = cut.held(view, x.element_size(), tensors, _processors(x.device))
    return None if c is None or (c.parts > 1 and x.device in _refused) else c


def _partial(x: Tensor, results: int, c: Cut) -> Tensor:
    return x.new_empty((results, c.parts, c.view.slots), dtype=STATISTICS_DTYPE)


def _channel_vector(x: Tensor, dtype: torch.dtype = STATISTICS_DTYPE) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


def _vectors(*values: Tensor | None) -> Iterator[Tensor | None]:
    return (None if v is None else v.contiguous() for v in values)


def _as(t: Tensor | None, x: Tensor) -> Tensor | None:
    return None if t is None else laid_out_as(t, x)


def _partial_moments(x: Tensor, c: Cut) -> Tensor:
    partial = _partial(x, 3, c)
    _launch(streaming.partial_moments, c.programs, x=x, partial=partial, **_streaming(c, x))
    return partial


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    c = _streamed(_view(x), x)
    mean, var = _channel_vector(x), _channel_vector(x)
    with _on(x):
        partial = _partial_moments(x, c)
        _merge(streaming.merge_moments, c, partial=partial, mean=mean, var=var)
    return mean, var


def _merge(kernel: Any, c: Cut, **args: Any) -> None:
    channels = c.view.channels
    programs = cut.ceil_div(channels, CHANNELS)
    _launch(
        kernel,
        programs,
        **args,
        channels=channels,
        parts=c.parts,
        RUN=c.view.run,
        CHANNELS=CHANNELS,
    )


def training_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _dense(x)
    residual = _as(residual, x)
    weight, bias = _vectors(weight, bias)
    view = _view(x)
    y, mean, var = torch.empty_like(x), _channel_vector(x), _channel_vector(x)
    gate = None
    if uses_gate(residual, activation):
        rows, length = gate_rows(x)
        gate = x.new_empty((rows, cut.ceil_div(length, 8)), dtype=torch.uint8)
    args = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "bias": bias,
        "mean": mean,
        "var": var,
        "y": y,
        "gate": gate,
        "EPS": eps,
        "ACTIVATION": activation,
    }
    with _on(x):
        c = _held(view, x, 1)
        if c is None or not _one_launch(
            on_chip.forward_on_chip, c, partial=_partial(x, 3, c), **args
        ):
            c = _streamed(view, x)
            partial = _partial_moments(x, c)
            _launch(
                streaming.forward_apply, c.programs, **args, partial=partial, **_streaming(c, x)
            )
    return y, mean, var, x.new_empty(0, dtype=torch.uint8) if gate is None else gate


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    x = _dense(x)
    residual = _as(residual, x)
    mean, var = mean.contiguous(), var.contiguous()
    weight, bias = _vectors(weight, bias)
    y = torch.empty_like(x)
    c = _streamed(_view(x), x)
    with _on(x):
        _launch(
            streaming.forward_apply,
            c.programs,
            x=x,
            residual=residual,
            weight=weight,
            bias=bias,
            mean=mean,
            var=var,
            partial=None,
            y=y,
            gate=None,
            EPS=eps,
            ACTIVATION=activation,
            **_streaming(c, x),
        )
    return y


def _dz(x: Tensor, residual: Tensor | None, gate: Tensor | None, activation: int) -> Tensor | None:
    wanted = activation != NONE and (residual is not None or gate is not None)
    return torch.empty_like(x) if wanted else None


def _backward_arguments(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: int,
) -> dict[str, Any]:
    """Return what the kernels of the two sums take."""
    x = _dense(x)
    mean, var = mean.contiguous(), var.contiguous()
    weight, bias = _vectors(weight, bias)
    if gate is not None:
        check_gate(gate, x)
    return {
        "dy": laid_out_as(dy, x),
        "x": x,
        "residual": _as(residual, x),
        "gate": gate,
        "weight": weight,
        "bias": bias,
        "mean": mean,
        "var": var,
        "dz": _dz(x, residual, gate, activation),
        "EPS": eps,
        "ACTIVATION": activation,
    }


def _partial_sums(args: dict[str, Any], c: Cut) -> Tensor:
    x = args["x"]
    partial = _partial(x, 2, c)
    _launch(streaming.partial_sums, c.programs, **args, partial=partial, **_streaming(c, x))
    return partial


def backward_sums(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = _backward_arguments(*arguments)
    x, dz = args["x"], args["dz"]
    c = _streamed(_view(x), x)
    sum_dz, sum_dz_xhat = _channel_vector(x), _channel_vector(x)
    with _on(x):
        partial = _partial_sums(args, c)
        _merge(streaming.merge_sums, c, partial=partial, sum_dz=sum_dz, sum_dz_xhat=sum_dz_xhat)
    return sum_dz, sum_dz_xhat, x.new_empty(0) if dz is None else dz


def training_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = _backward_arguments(*arguments)
    x, dz = args["x"], args["dz"]
    view = _view(x)
    dtype = compute_dtype(x)
    results = {
        "dx": torch.empty_like(x),
        "dweight": _channel_vector(x, dtype),
        "dbias": _channel_vector(x, dtype),
    }
    with _on(x):
        c = _held(view, x, 2)
        if c is None or not _one_launch(
            on_chip.backward_on_chip, c, partial=_partial(x, 2, c), **args, **results
        ):
            c = _streamed(view, x)
            partial = _partial_sums(args, c)
            kept = ("x", "weight", "bias", "mean", "var", "EPS")
            _launch(
                streaming.backward_apply,
                c.programs,
                dy=args["dy"] if dz is None else dz,
                **{name: args[name] for name in kept},
                mean_dz=None,
                mean_dz_xhat=None,
                partial=partial,
                ACTIVATION=args["ACTIVATION"] if dz is None else NONE,
                **results,
                **_streaming(c, x),
            )
    empty = x.new_empty(0) if dz is None else dz
    return results["dx"], empty, results["dweight"], results["dbias"]


def backward_apply(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    x = _dense(x)
    mean, var = mean.contiguous(), var.contiguous()
    weight, bias = _vectors(weight, bias)
    mean_dz, mean_dz_xhat = _vectors(mean_dz, mean_dz_xhat)
    dx = torch.empty_like(x)
    c = _streamed(_view(x), x)
    with _on(x):
        _launch(
            streaming.backward_apply,
            c.programs,
            dy=laid_out_as(dy, x),
            x=x,
            weight=weight,
            bias=bias,
            mean=mean,
            var=var,
            mean_dz=mean_dz,
            mean_dz_xhat=mean_dz_xhat,
            partial=None,
            dweight=None,
            dbias=None,
            dx=dx,
            EPS=eps,
            ACTIVATION=activation,
            **_streaming(c, x),
        )
    return dx


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    n: float,
    momentum: float | None,
) -> None:
    weight = 0.0 if momentum is None else momentum
    # A kernel takes floats in single precision: two of them.
    high = float(np.float32(weight))
    mean, var = mean.contiguous(), var.contiguous()
    with _on(running_mean):
        _launch(
            streaming.update_running,
            1,
            running_mean=running_mean,
            running_var=running_var,
            num_batches=num_batches,
            mean=mean,
            var=var,
            mean_stride=running_mean.stride(0),
            var_stride=running_var.stride(0),
            channels=running_mean.numel(),
            n=float(n),
            w=high,
            w_rest=weight - high,
            CUMULATIVE=momentum is None,
            CHANNELS=UPDATED,
        )


OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        training_forward,
        training_backward,
        moments,
        normalize,
        backward_sums,
        backward_apply,
        update_running,
    )
}
