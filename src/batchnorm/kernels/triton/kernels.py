"""The kernels.

A tensor is read in tiles of ROWS × COLS. In *planes* (contiguous, N × C × S) a program has one
channel, whose tiles cover n and s; in *columns* (everything else: R × K in memory, a channel
being RUN neighbouring columns) it has COLS columns, and its tiles go down the rows. What belongs
to channels is a row of one or of COLS values, so that both share all arithmetic. The number of
columns comes as units·ALIGN, from which the compiler sees how wide it may load.

Programs are numbered part by part: neighbours in time are neighbours in memory. ``partial`` keeps
what each part found, and is merged in the order of the parts: the result does not depend on who
was first. The second pass goes backwards, since the end of the first is still in the cache.

What the values mean, and how z is rounded, is said once, in :mod:`batchnorm.ops`. T is the type
of the arithmetic.
"""

import triton
import triton.language as tl

from batchnorm.kernels.triton.activation import (
    NONE,
    activate,
    is_open,
    through,
    through_gate,
)

# Float squares overflow around 1e19 and vanish around 1e-19: such moments are taken again.
LARGEST = tl.constexpr(1e37)
SMALLEST = tl.constexpr(1e-28)

# So many tiles are on their way to a program.
STAGES = tl.constexpr(3)

# So many partial results are merged at a time.
MERGED = tl.constexpr(1024)


@triton.jit
def _share(pid, rows, cols, channels, parts, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a program's part, its block of channels, its first tile and the first after it."""
    if PLANES:
        blocks = channels
        tiles = tl.cdiv(rows, ROWS) * tl.cdiv(cols, COLS)
    else:
        blocks = tl.cdiv(cols, COLS)
        tiles = tl.cdiv(rows, ROWS)
    per_part = tl.cdiv(tiles, parts)
    part = pid // blocks
    first = part * per_part
    return part, pid % blocks, first, tl.minimum(first + per_part, tiles)


@triton.jit
def _tile(tile, block, rows, cols, channels, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return where a tile begins, its offsets from there, which of them exist, and how many rows
    and columns do.
    """
    if PLANES:
        across = tl.cdiv(cols, COLS)
        row = tile // across * ROWS
        col = tile % across * COLS
        stride = channels * cols
        begin = tl.cast(row, tl.int64) * stride + tl.cast(block, tl.int64) * cols + col
    else:
        row = tile * ROWS
        col = block * COLS
        stride = cols
        begin = tl.cast(row, tl.int64) * stride + col
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLS)[None, :]
    inside = (row + i < rows) & (col + j < cols)
    return begin, i * stride + j, inside, tl.minimum(rows - row, ROWS), tl.minimum(cols - col, COLS)


@triton.jit
def _channels(block, cols, channels, PLANES: tl.constexpr, RUN: tl.constexpr, COLS: tl.constexpr):
    """Return for what belongs to channels: its slot among the partial results, whether there is
    one, its channel, and whether it is the first of that channel.
    """
    if PLANES:
        valid = block < channels
        return block, valid, block, valid
    else:
        slot = block * COLS + tl.arange(0, COLS)[None, :]
        valid = slot < cols
        return slot, valid, slot // RUN, valid & (slot % RUN == 0)


@triton.jit
def _total(values, PLANES: tl.constexpr):
    """Sum over what belongs to a channel."""
    if PLANES:
        return tl.sum(tl.sum(values, 0), 0)
    else:
        return tl.sum(values, 0, keep_dims=True)


@triton.jit
def _any(flags, PLANES: tl.constexpr):
    """Tell whether one flag is set."""
    if PLANES:
        return flags
    else:
        return tl.max(tl.max(flags.to(tl.int32), 1), 0) > 0


@triton.jit
def _pivot(x, inside, PLANES: tl.constexpr):
    """Return a value near the mean of each channel of a tile, and equal to it where all are."""
    low = tl.where(inside, x, float("inf"))
    high = tl.where(inside, x, float("-inf"))
    if PLANES:
        low = tl.min(tl.min(low, 0), 0)
        high = tl.max(tl.max(high, 0), 0)
    else:
        low = tl.min(low, 0, keep_dims=True)
        high = tl.max(high, 0, keep_dims=True)
    mean = _total(tl.where(inside, x, 0.0), PLANES) / _total(inside.to(x.dtype), PLANES)
    return tl.minimum(tl.maximum(mean, low), high)


@triton.jit
def _from_sums(count, pivot, sums, squares, valid, PLANES: tl.constexpr):
    """Return mean and Σ(x−mean)² from sums of d = x − pivot and d², and whether to doubt them."""
    s = _total(sums.to(tl.float64), PLANES)
    q = _total(squares.to(tl.float64), PLANES)
    mean = s / count
    m2 = q - s * mean
    m2 = tl.where(m2 < 0, 0.0, m2)
    constant = (q == 0) & (_total(tl.abs(sums), PLANES) == 0)
    sound = (m2 < LARGEST) & (m2 > count * SMALLEST)
    doubtful = valid & ~(constant | sound)
    return pivot.to(tl.float64) + mean, m2, _any(doubtful, PLANES)


@triton.jit
def _moments_of_part(
    x, block, first, last, valid, rows, cols, channels,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return number, mean and Σ(x−mean)² of the values of some tiles."""
    begin, offset, inside, high, wide = _tile(first, block, rows, cols, channels, PLANES, ROWS, COLS)
    pivot = _pivot(tl.load(x + begin + offset, inside, 0).to(T), inside, PLANES)
    sums = tl.zeros([ROWS, COLS], T)
    squares = tl.zeros([ROWS, COLS], T)
    number = first * 0
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside, high, wide = _tile(
            tile, block, rows, cols, channels, PLANES, ROWS, COLS
        )
        d = tl.where(inside, tl.load(x + begin + offset, inside, 0).to(T) - pivot, 0.0)
        sums += d
        squares += d * d
        if PLANES:
            number += high * wide
        else:
            number += high
    count = number.to(tl.float64)
    mean, m2, doubtful = _from_sums(count, pivot, sums, squares, valid, PLANES)
    if doubtful:
        mean, m2 = _careful_moments(
            x, block, first, last, count, rows, cols, channels, PLANES, ROWS, COLS
        )
    return count, mean, m2


@triton.jit
def _careful_moments(
    x, block, first, last, count, rows, cols, channels,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return mean and Σ(x−mean)² in float64 and two passes."""
    sums = tl.zeros([ROWS, COLS], tl.float64)
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside, high, wide = _tile(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        sums += tl.load(x + begin + offset, inside, 0).to(tl.float64)
    mean = _total(sums, PLANES) / count
    squares = tl.zeros([ROWS, COLS], tl.float64)
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside, high, wide = _tile(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.where(inside, tl.load(x + begin + offset, inside, 0).to(tl.float64) - mean, 0.0)
        squares += d * d
    return mean, _total(squares, PLANES)


@triton.jit
def _put_moments(partial, part, parts, slot, slots, valid, count, mean, m2):
    at = partial + part * slots + slot
    tl.store(at, count + mean * 0, valid)
    tl.store(at + parts * slots, mean, valid)
    tl.store(at + 2 * parts * slots, m2, valid)


@triton.jit
def _at_parts(
    start, partial, parts, channel, valid, channels,
    PLANES: tl.constexpr, RUN: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Return where the partial results of channels are, EACH at a time, and which exist."""
    i = start + tl.arange(0, EACH)
    if not PLANES:
        i = i[:, None]
    at = partial + (i // RUN) * (channels * RUN) + channel * RUN + i % RUN
    return at, (i < parts * RUN) & valid


@triton.jit
def _over_parts(values, PLANES: tl.constexpr):
    if PLANES:
        return tl.sum(values, 0)
    else:
        return tl.sum(values, 0, keep_dims=True)


@triton.jit
def _merged_moments(
    partial, parts, channel, valid, channels,
    PLANES: tl.constexpr, RUN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return mean and biased variance of each channel (Chan, Golub and LeVeque)."""
    EACH: tl.constexpr = MERGED if PLANES else MERGED // COLS
    size = parts * channels * RUN
    n = channel.to(tl.float64) * 0
    mean = n
    m2 = n
    for start in range(0, parts * RUN, EACH):
        at, there = _at_parts(start, partial, parts, channel, valid, channels, PLANES, RUN, EACH)
        # Past the first cache, which does not notice what other programs wrote.
        counts = tl.load(at, there, 0, cache_modifier=".cg")
        means = tl.load(at + size, there, 0, cache_modifier=".cg")
        squares = tl.load(at + 2 * size, there, 0, cache_modifier=".cg")
        total = n + _over_parts(counts, PLANES)
        merged = (n * mean + _over_parts(counts * means, PLANES)) / total
        old = mean - merged
        new = means - merged
        m2 += n * old * old + _over_parts(squares + counts * new * new, PLANES)
        n = total
        mean = merged
    return mean, m2 / n


@triton.jit
def _merged_sums(
    partial, parts, channel, valid, channels,
    PLANES: tl.constexpr, RUN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return the two sums of each channel."""
    EACH: tl.constexpr = MERGED if PLANES else MERGED // COLS
    size = parts * channels * RUN
    first = channel.to(tl.float64) * 0
    second = first
    for start in range(0, parts * RUN, EACH):
        at, there = _at_parts(start, partial, parts, channel, valid, channels, PLANES, RUN, EACH)
        first += _over_parts(tl.load(at, there, 0, cache_modifier=".cg"), PLANES)
        second += _over_parts(tl.load(at + size, there, 0, cache_modifier=".cg"), PLANES)
    return first, second


@triton.jit
def _affine(mean, var, weight, bias, channel, valid, EPS: tl.constexpr, T: tl.constexpr):
    """Return centre, scale and shift of z = (x − centre)·scale + shift."""
    centre = mean.to(T)
    scale = 1 / tl.sqrt(var + EPS)
    if weight is not None:
        scale *= tl.load(weight + channel, valid, 0).to(tl.float64)
    shift = (centre.to(tl.float64) - mean) * scale
    if bias is not None:
        shift += tl.load(bias + channel, valid, 0).to(tl.float64)
    return centre, scale.to(T), shift.to(T)


@triton.jit
def _put_bits(gate, bits, tile, block, rows, cols, channels, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pack a tile of booleans, eight to a byte."""
    begin, offset, inside, high, wide = _tile(
        tile, block, rows, tl.cdiv(cols, 8), channels, PLANES, ROWS, COLS // 8
    )
    eights = tl.reshape(bits.to(tl.int32), [ROWS, COLS // 8, 8])
    packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
    tl.store(gate + begin + offset, packed.to(tl.uint8), inside)


@triton.jit
def _get_bits(gate, tile, block, rows, cols, channels, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    begin, offset, inside, high, wide = _tile(
        tile, block, rows, tl.cdiv(cols, 8), channels, PLANES, ROWS, COLS // 8
    )
    packed = tl.load(gate + begin + offset, inside, 0).to(tl.int32)
    eights = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eights, [ROWS, COLS]) != 0


@triton.jit
def partial_moments(
    x, partial, rows, units, channels, parts,
    PLANES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Leave number, mean and Σ(x−mean)² of each part in ``partial`` (3, parts, slots)."""
    cols = units * ALIGN
    part, block, first, last = _share(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, _, _ = _channels(block, cols, channels, PLANES, RUN, COLS)
    count, mean, m2 = _moments_of_part(
        x, block, first, last, valid, rows, cols, channels, PLANES, ROWS, COLS, T
    )
    _put_moments(partial, part, parts, slot, channels * RUN, valid, count, mean, m2)


@triton.jit
def merge_moments(
    partial, mean, var, channels, parts, RUN: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = channel < channels
    m, v = _merged_moments(partial, parts, channel, valid, channels, False, RUN, CHANNELS)
    tl.store(mean + channel, m, valid)
    tl.store(var + channel, v, valid)


@triton.jit
def _finish_forward(
    x, residual, y, gate, centre, scale, shift, begin, offset, inside,
    tile, block, rows, cols, channels,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Normalise the values x of a tile and write what follows from them."""
    z = tl.fma(x.to(T) - centre, tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
    if residual is not None:
        z += tl.load(residual + begin + offset, inside, 0).to(T)
    if gate is not None:
        bits = is_open(z, ACTIVATION) & inside
        _put_bits(gate, bits, tile, block, rows, cols, channels, PLANES, ROWS, COLS)
    tl.store(y + begin + offset, activate(z, ACTIVATION).to(y.dtype.element_ty), inside)


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
    part, block, first, last = _share(pid, rows, cols, channels, parts, PLANES, ROWS, COLS)
    _, valid, channel, leads = _channels(block, cols, channels, PLANES, RUN, COLS)
    if partial is not None:
        m, v = _merged_moments(partial, parts, channel, valid, channels, PLANES, RUN, COLS)
        if part == 0:
            tl.store(mean + channel, m, leads)
            tl.store(var + channel, v, leads)
    else:
        m = tl.load(mean + channel, valid, 0).to(tl.float64)
        v = tl.load(var + channel, valid, 1).to(tl.float64)
    centre, scale, shift = _affine(m, v, weight, bias, channel, valid, EPS, T)
    for i in tl.range(first, last, num_stages=STAGES):
        tile = last - 1 - (i - first)
        begin, offset, inside, high, wide = _tile(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        values = tl.load(x + begin + offset, inside, 0)
        _finish_forward(
            values, residual, y, gate, centre, scale, shift, begin, offset, inside,
            tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
        )  # fmt: skip


@triton.jit
def _dz(
    dy, x, residual, gate, centre, scale, shift, begin, offset, inside,
    tile, block, rows, cols, channels,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return dz of a tile, whose x less its centre is given."""
    dz = tl.load(dy + begin + offset, inside, 0).to(T)
    if gate is not None:
        bits = _get_bits(gate, tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        dz = through_gate(dz, bits, ACTIVATION)
    elif ACTIVATION != NONE:
        z = tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
        if residual is not None:
            z += tl.load(residual + begin + offset, inside, 0).to(T)
        dz = through(dz, z, ACTIVATION)
    return dz


@triton.jit
def partial_sums(
    dy, x, residual, gate, weight, bias, mean, var, dz, partial, rows, units, channels, parts,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Leave Σdz and Σdz·x̂ of each part in ``partial`` (2, parts, slots), and dz where asked."""
    cols = units * ALIGN
    part, block, first, last = _share(
        tl.program_id(0), rows, cols, channels, parts, PLANES, ROWS, COLS
    )
    slot, valid, channel, _ = _channels(block, cols, channels, PLANES, RUN, COLS)
    m = tl.load(mean + channel, valid, 0).to(tl.float64)
    v = tl.load(var + channel, valid, 1).to(tl.float64)
    _, unit, left = _affine(m, v, None, None, channel, valid, EPS, T)
    centre, scale, shift = _affine(m, v, weight, bias, channel, valid, EPS, T)
    sums = tl.zeros([ROWS, COLS], T)
    products = tl.zeros([ROWS, COLS], T)
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside, high, wide = _tile(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.load(x + begin + offset, inside, 0).to(T) - centre
        g = _dz(
            dy, d, residual, gate, centre, scale, shift, begin, offset, inside,
            tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
        )  # fmt: skip
        if dz is not None:
            tl.store(dz + begin + offset, g.to(dz.dtype.element_ty), inside)
        xhat = tl.fma(d, tl.broadcast_to(unit, d.shape), tl.broadcast_to(left, d.shape))
        sums += g
        products += tl.where(inside, g * xhat, 0.0)
    at = partial + part * channels * RUN + slot
    tl.store(at, _total(sums.to(tl.float64), PLANES), valid)
    tl.store(at + parts * channels * RUN, _total(products.to(tl.float64), PLANES), valid)


@triton.jit
def merge_sums(
    partial, sum_dz, sum_dz_xhat, channels, parts, RUN: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    valid = channel < channels
    first, second = _merged_sums(partial, parts, channel, valid, channels, False, RUN, CHANNELS)
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
    part, block, first, last = _share(pid, rows, cols, channels, parts, PLANES, ROWS, COLS)
    _, valid, channel, leads = _channels(block, cols, channels, PLANES, RUN, COLS)
    m = tl.load(mean + channel, valid, 0).to(tl.float64)
    v = tl.load(var + channel, valid, 1).to(tl.float64)
    _, unit, left = _affine(m, v, None, None, channel, valid, EPS, T)
    centre, scale, shift = _affine(m, v, weight, bias, channel, valid, EPS, T)
    if partial is not None:
        sum_dz, sum_dz_xhat = _merged_sums(
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
        begin, offset, inside, high, wide = _tile(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.load(x + begin + offset, inside, 0).to(T) - centre
        g = _dz(
            dy, d, None, None, centre, scale, shift, begin, offset, inside,
            tile, block, rows, cols, channels, ACTIVATION, PLANES, ROWS, COLS, T,
        )  # fmt: skip
        xhat = tl.fma(d, tl.broadcast_to(unit, d.shape), tl.broadcast_to(left, d.shape))
        value = (g - a - xhat * b) * scale
        tl.store(dx + begin + offset, value.to(dx.dtype.element_ty), inside)


@triton.jit
def update_running(
    running_mean, running_var, num_batches, mean, var, channels, n, w, w_rest,
    CUMULATIVE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Average a batch into the running statistics. One program: it also counts the batch."""
    weight = tl.cast(w, tl.float64) + tl.cast(w_rest, tl.float64)
    if num_batches is not None:
        batches = tl.load(num_batches) + 1
        tl.store(num_batches, batches)
        if CUMULATIVE:
            weight = 1 / batches.to(tl.float64)
    number = tl.cast(n, tl.float64)
    unbias = number / (number - 1)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        valid = channel < channels
        for k in tl.static_range(2):
            running = running_mean if k == 0 else running_var
            now = tl.load((mean if k == 0 else var) + channel, valid, 0).to(tl.float64)
            now = now if k == 0 else now * unbias
            old = tl.load(running + channel, valid, 0).to(tl.float64)
            tl.store(running + channel, (old + weight * (now - old)).to(running.dtype.element_ty), valid)
