"""One launch for what fits on the chip: a program keeps its tile in registers between the passes.

Programs that share a channel meet at a barrier, so all of them must be resident (a cooperative
launch). The tile is the whole share of a program, in the two shapes that :mod:`.kernels` knows.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.kernels import (
    _affine,
    _channels,
    _dz,
    _finish_forward,
    _from_sums,
    _merged_moments,
    _merged_sums,
    _pivot,
    _put_moments,
    _share,
    _tile,
    _total,
)


@triton.jit
def _meet(barrier):
    """Wait for all programs. The last to arrive flips the sign, so nothing need be reset."""
    tl.debug_barrier()
    others = tl.num_programs(0) - 1
    # All arrivals together add 2³¹.
    arrival = tl.where(tl.program_id(0) == 0, 2147483647 - (others - 1), 1)
    before = tl.atomic_add(barrier, arrival, sem="release")
    waiting = True
    while waiting:
        now = tl.atomic_add(barrier, 0, sem="acquire")
        waiting = (before ^ now) >= 0
    tl.debug_barrier()


@triton.jit
def forward_on_chip(
    x, residual, weight, bias, mean, var, partial, barrier, y, gate, rows, units, channels, parts,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr, MEET: tl.constexpr,
):  # fmt: skip
    """Normalise by the moments of the batch, which also go to mean and var."""
    cols = units * ALIGN
    part, block, tile, _ = _share(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, channel, _ = _channels(block, cols, channels, PLANES, 1, COLS)
    begin, offset, inside, high, wide = _tile(
        tile, block, rows, cols, channels, PLANES, ROWS, COLS
    )
    values = tl.load(x + begin + offset, inside, 0)
    pivot = _pivot(values.to(T), inside, PLANES)
    d = tl.where(inside, values.to(T) - pivot, 0.0)
    count = (high * wide if PLANES else high).to(tl.float64)
    m, m2, doubtful = _from_sums(count, pivot, d, d * d, valid, PLANES)
    if doubtful:
        m = _total(values.to(tl.float64), PLANES) / count
        far = tl.where(inside, values.to(tl.float64) - m, 0.0)
        m2 = _total(far * far, PLANES)
    if parts > 1:
        _put_moments(partial, part, parts, slot, channels, valid, count, m, m2)
        if MEET:
            _meet(barrier)
        m, v = _merged_moments(partial, parts, channel, valid, channels, PLANES, 1, COLS)
    else:
        v = m2 / count
    if part == 0:
        tl.store(mean + channel, m, valid)
        tl.store(var + channel, v, valid)
    centre, scale, shift = _affine(m, v, weight, bias, channel, valid, EPS, T)
    _finish_forward(
        values, residual, y, gate, centre, scale, shift, begin, offset, inside,
        tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
    )  # fmt: skip


@triton.jit
def backward_on_chip(
    dy, x, residual, gate, weight, bias, mean, var, partial, barrier, dz, dweight, dbias, dx,
    rows, units, channels, parts,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr, MEET: tl.constexpr,
):  # fmt: skip
    """Write all gradients."""
    cols = units * ALIGN
    part, block, tile, _ = _share(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, channel, _ = _channels(block, cols, channels, PLANES, 1, COLS)
    begin, offset, inside, high, wide = _tile(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
    m = tl.load(mean + channel, valid, 0).to(tl.float64)
    v = tl.load(var + channel, valid, 1).to(tl.float64)
    _, unit, left = _affine(m, v, None, None, channel, valid, EPS, T)
    centre, scale, shift = _affine(m, v, weight, bias, channel, valid, EPS, T)
    d = tl.load(x + begin + offset, inside, 0).to(T) - centre
    g = _dz(
        dy, d, residual, gate, centre, scale, shift, begin, offset, inside,
        tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
    )  # fmt: skip
    if dz is not None:
        tl.store(dz + begin + offset, g.to(dz.dtype.element_ty), inside)
    xhat = tl.fma(d, tl.broadcast_to(unit, d.shape), tl.broadcast_to(left, d.shape))
    sum_dz = _total(g.to(tl.float64), PLANES)
    sum_dz_xhat = _total(tl.where(inside, g * xhat, 0.0).to(tl.float64), PLANES)
    if parts > 1:
        at = partial + part * channels + slot
        tl.store(at, sum_dz, valid)
        tl.store(at + parts * channels, sum_dz_xhat, valid)
        if MEET:
            _meet(barrier)
        sum_dz, sum_dz_xhat = _merged_sums(
            partial, parts, channel, valid, channels, PLANES, 1, COLS
        )
    if part == 0:
        tl.store(dbias + channel, sum_dz.to(T), valid)
        tl.store(dweight + channel, sum_dz_xhat.to(T), valid)
    n = (tl.cast(rows, tl.float64) * cols) if PLANES else tl.cast(rows, tl.float64)
    value = (g - (sum_dz / n).to(T) - xhat * (sum_dz_xhat / n).to(T)) * scale
    tl.store(dx + begin + offset, value.to(dx.dtype.element_ty), inside)
