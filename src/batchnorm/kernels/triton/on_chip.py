"""One launch for what fits on the chip: a program keeps its tile in registers between the passes.

Programs that share a channel meet at a barrier, so all of them must be resident (a cooperative
launch). The tile is the whole share of a program, in the two shapes that :mod:`.tiles` knows.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.tiles import (
    affine,
    careful_moments,
    channels_of,
    dz_of,
    finish_forward,
    merged_moments,
    merged_sums,
    moments_from_sums,
    pivot_of,
    put_moments,
    share_of,
    tile_at,
    total_of,
    values_in,
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
    part, block, tile, _ = share_of(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, channel, _ = channels_of(block, cols, channels, PLANES, 1, COLS)
    begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
    values = tl.load(x + begin + offset, inside, 0)
    pivot, constant = pivot_of(values.to(T), inside, PLANES)
    d = tl.where(inside, values.to(T) - pivot, 0.0)
    count = values_in(tile, rows, cols, PLANES, ROWS, COLS).to(tl.float64)
    # So few values lose nothing in a sum of single precision, and the double would not fit.
    s = total_of(d, PLANES)
    m, m2, doubtful = moments_from_sums(
        count, pivot, s, total_of(d * d, PLANES), constant, valid, PLANES
    )
    if doubtful:
        PIECES: tl.constexpr = min(ROWS, 16)
        m, m2 = careful_moments(
            x, block, tile * PIECES, tile * PIECES + PIECES, count, rows, cols, channels,
            PLANES, ROWS // PIECES, COLS,
        )  # fmt: skip
    if parts > 1:
        put_moments(partial, part, parts, slot, channels, valid, count, m, m2)
        if MEET:
            _meet(barrier)
        m, v = merged_moments(partial, parts, channel, valid, channels, PLANES, 1, COLS)
    else:
        v = m2 / count
    if part == 0:
        tl.store(mean + channel, m, valid)
        tl.store(var + channel, v, valid)
    centre, scale, shift = affine(m, v, weight, bias, channel, valid, EPS, T)
    finish_forward(
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
    part, block, tile, _ = share_of(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, channel, _ = channels_of(block, cols, channels, PLANES, 1, COLS)
    begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
    m = tl.load(mean + channel, valid, 0).to(tl.float64)
    v = tl.load(var + channel, valid, 1).to(tl.float64)
    _, unit, left = affine(m, v, None, None, channel, valid, EPS, T)
    centre, scale, shift = affine(m, v, weight, bias, channel, valid, EPS, T)
    d = tl.load(x + begin + offset, inside, 0).to(T) - centre
    g = dz_of(
        dy, d, residual, gate, centre, scale, shift, begin, offset, inside,
        tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
    )  # fmt: skip
    if dz is not None:
        tl.store(dz + begin + offset, g.to(dz.dtype.element_ty), inside)
    xhat = tl.fma(d, tl.broadcast_to(unit, d.shape), tl.broadcast_to(left, d.shape))
    sum_dz = total_of(g, PLANES).to(tl.float64)
    sum_dz_xhat = total_of(g * xhat, PLANES).to(tl.float64)
    if parts > 1:
        at = partial + part * channels + slot
        tl.store(at, sum_dz, valid)
        tl.store(at + parts * channels, sum_dz_xhat, valid)
        if MEET:
            _meet(barrier)
        sum_dz, sum_dz_xhat = merged_sums(partial, parts, channel, valid, channels, PLANES, 1, COLS)
    if part == 0:
        tl.store(dbias + channel, sum_dz.to(T), valid)
        tl.store(dweight + channel, sum_dz_xhat.to(T), valid)
    n = (tl.cast(rows, tl.float64) * cols) if PLANES else tl.cast(rows, tl.float64)
    value = (g - (sum_dz / n).to(T) - xhat * (sum_dz_xhat / n).to(T)) * scale
    tl.store(dx + begin + offset, value.to(dx.dtype.element_ty), inside)
