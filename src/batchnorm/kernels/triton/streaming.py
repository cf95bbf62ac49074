"""The kernels of two launches, for what does not fit on the chip: partial results, then the rest.

The second goes backwards, since the end of the first is still in the cache.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.tiles import (
    STAGES,
    affine,
    channels_of,
    dz_of,
    finish_forward,
    merged_moments,
    merged_sums,
    moments_of_part,
    put_moments,
    share_of,
    tile_at,
    total_of,
)


@triton.jit
def partial_moments(
    x, partial, rows, units, channels, parts,
    PLANES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Leave number, mean and Σ(x−mean)² of each part in ``partial`` (3, parts, slots)."""
    cols = units * ALIGN
    part, block, first, last = share_of(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, _, _ = channels_of(block, cols, channels, PLANES, RUN, COLS)
    count, mean, m2 = moments_of_part(
        x, block, first, last, valid, rows, cols, channels, PLANES, ROWS, COLS, T
    )
    put_moments(partial, part, parts, slot, channels * RUN, valid, count, mean, m2)


@triton.jit
def merge_moments(
    partial, mean, var, channels, parts, RUN: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Write the moments in ``partial``."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = channel < channels
    m, v = merged_moments(partial, parts, channel, valid, channels, False, RUN, CHANNELS)
    tl.store(mean + channel, m, valid)
    tl.store(var + channel, v, valid)


@triton.jit
def forward_apply(
    x, residual, weight, bias, mean, var, partial, y, gate, rows, units, channels, parts,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Normalise by the moments in ``partial``, which also go to mean and var, or by these."""
    cols = units * ALIGN
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    part, block, first, last = share_of(pid, rows, cols, channels, parts, PLANES, ROWS, COLS)
    _, valid, channel, leads = channels_of(block, cols, channels, PLANES, RUN, COLS)
    if partial is not None:
        m, v = merged_moments(partial, parts, channel, valid, channels, PLANES, RUN, COLS)
        if part == 0:
            tl.store(mean + channel, m, leads)
            tl.store(var + channel, v, leads)
    else:
        m = tl.load(mean + channel, valid, 0).to(tl.float64)
        v = tl.load(var + channel, valid, 1).to(tl.float64)
    centre, scale, shift = affine(m, v, weight, bias, channel, valid, EPS, T)
    for i in tl.range(first, last, num_stages=STAGES):
        tile = last - 1 - (i - first)
        begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        values = tl.load(x + begin + offset, inside, 0)
        finish_forward(
            values, residual, y, gate, centre, scale, shift, begin, offset, inside,
            tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
        )  # fmt: skip


@triton.jit
def partial_sums(
    dy, x, residual, gate, weight, bias, mean, var, dz, partial, rows, units, channels, parts,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Leave Σdz and Σdz·x̂ of each part in ``partial`` (2, parts, slots), and dz where asked."""
    cols = units * ALIGN
    part, block, first, last = share_of(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, channel, _ = channels_of(block, cols, channels, PLANES, RUN, COLS)
    m = tl.load(mean + channel, valid, 0).to(tl.float64)
    v = tl.load(var + channel, valid, 1).to(tl.float64)
    _, unit, left = affine(m, v, None, None, channel, valid, EPS, T)
    centre, scale, shift = affine(m, v, weight, bias, channel, valid, EPS, T)
    sums = tl.zeros([ROWS, COLS], T)
    products = tl.zeros([ROWS, COLS], T)
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.load(x + begin + offset, inside, 0).to(T) - centre
        g = dz_of(
            dy, d, residual, gate, centre, scale, shift, begin, offset, inside,
            tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
        )  # fmt: skip
        if dz is not None:
            tl.store(dz + begin + offset, g.to(dz.dtype.element_ty), inside)
        xhat = tl.fma(d, tl.broadcast_to(unit, d.shape), tl.broadcast_to(left, d.shape))
        sums += g
        products += g * xhat  # outside of the tensor dz is 0
    at = partial + part * channels * RUN + slot
    tl.store(at, total_of(sums.to(tl.float64), PLANES), valid)
    tl.store(at + parts * channels * RUN, total_of(products.to(tl.float64), PLANES), valid)


@triton.jit
def merge_sums(
    partial, sum_dz, sum_dz_xhat, channels, parts, RUN: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Write the sums in ``partial``."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = channel < channels
    first, second = merged_sums(partial, parts, channel, valid, channels, False, RUN, CHANNELS)
    tl.store(sum_dz + channel, first, valid)
    tl.store(sum_dz_xhat + channel, second, valid)


@triton.jit
def backward_apply(
    dy, x, weight, bias, mean, var, mean_dz, mean_dz_xhat, partial, dweight, dbias, dx,
    rows, units, channels, parts,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write dx by the sums in ``partial``, which also go to dweight and dbias, or by the means."""
    cols = units * ALIGN
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    part, block, first, last = share_of(pid, rows, cols, channels, parts, PLANES, ROWS, COLS)
    _, valid, channel, leads = channels_of(block, cols, channels, PLANES, RUN, COLS)
    m = tl.load(mean + channel, valid, 0).to(tl.float64)
    v = tl.load(var + channel, valid, 1).to(tl.float64)
    _, unit, left = affine(m, v, None, None, channel, valid, EPS, T)
    centre, scale, shift = affine(m, v, weight, bias, channel, valid, EPS, T)
    if partial is not None:
        sum_dz, sum_dz_xhat = merged_sums(
            partial, parts, channel, valid, channels, PLANES, RUN, COLS
        )
        if part == 0:
            tl.store(dbias + channel, sum_dz.to(T), leads)
            tl.store(dweight + channel, sum_dz_xhat.to(T), leads)
        n = (tl.cast(rows, tl.float64) * cols) if PLANES else (tl.cast(rows, tl.float64) * RUN)
        a = (sum_dz / n).to(T)
        b = (sum_dz_xhat / n).to(T)
    else:
        a = channel.to(T) * 0
        b = a
        if mean_dz is not None:
            a = tl.load(mean_dz + channel, valid, 0).to(T)
        if mean_dz_xhat is not None:
            b = tl.load(mean_dz_xhat + channel, valid, 0).to(T)
    for i in tl.range(first, last, num_stages=STAGES):
        tile = last - 1 - (i - first)
        begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.load(x + begin + offset, inside, 0).to(T) - centre
        g = dz_of(
            dy, d, None, None, centre, scale, shift, begin, offset, inside,
            tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
        )  # fmt: skip
        xhat = tl.fma(d, tl.broadcast_to(unit, d.shape), tl.broadcast_to(left, d.shape))
        value = (g - a - xhat * b) * scale
        tl.store(dx + begin + offset, value.to(dx.dtype.element_ty), inside)


@triton.jit
def _move(running, batch, stride, channel, valid, weight, factor):
    place = running + channel * stride
    old = tl.load(place, valid, 0).to(tl.float64)
    new = tl.load(batch + channel, valid, 0).to(tl.float64) * factor
    tl.store(place, (old + weight * (new - old)).to(running.dtype.element_ty), valid)


@triton.jit
def update_running(
    running_mean, running_var, num_batches, mean, var, mean_stride, var_stride, channels,
    n, w, w_rest, CUMULATIVE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Average a batch into the running statistics. One program, as it also counts the batch."""
    weight = tl.cast(w, tl.float64) + w_rest
    if num_batches is not None:
        batches = tl.load(num_batches) + 1
        tl.store(num_batches, batches)
        if CUMULATIVE:
            weight = 1 / batches.to(tl.float64)
    number = tl.cast(n, tl.float64)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        valid = channel < channels
        _move(running_mean, mean, mean_stride, channel, valid, weight, 1.0)
        _move(running_var, var, var_stride, channel, valid, weight, number / (number - 1))
