"""What the kernels share: how a program finds its tiles, moments and sums, one tile at a time.

A tensor is read in tiles of ROWS × COLS. In *planes* (contiguous, N × C × S) a program has one
channel, whose tiles cover n and s; in *columns* (everything else: R × K in memory, a channel
being RUN neighbouring columns) it has COLS columns, and its tiles go down the rows. What belongs
to channels is a row of one or of COLS values, so that both share all arithmetic. The number of
columns comes as units·ALIGN, from which the compiler sees how wide it may load.

Programs are numbered part by part: neighbours in time are neighbours in memory. ``partial`` keeps
what each part found, and is merged in the order of the parts: the result does not depend on who
was first.

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
def share_of(
    pid, rows, cols, channels, parts, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
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
def tile_at(
    tile, block, rows, cols, channels, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return where a tile begins, its offsets from there, and which of them exist."""
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
    return begin, i * stride + j, (row + i < rows) & (col + j < cols)


@triton.jit
def values_in(tile, rows, cols, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return how many values of a channel a tile has."""
    if PLANES:
        across = tl.cdiv(cols, COLS)
        high = tl.minimum(rows - tile // across * ROWS, ROWS)
        return high * tl.minimum(cols - tile % across * COLS, COLS)
    else:
        return tl.minimum(rows - tile * ROWS, ROWS)


@triton.jit
def channels_of(block, cols, channels, PLANES: tl.constexpr, RUN: tl.constexpr, COLS: tl.constexpr):
    """Return slots among the partial results, which exist, their channels, which are the first."""
    if PLANES:
        valid = block < channels
        return block, valid, block, valid
    else:
        slot = block * COLS + tl.arange(0, COLS)[None, :]
        valid = slot < cols
        return slot, valid, slot // RUN, valid & (slot % RUN == 0)


@triton.jit
def total_of(values, PLANES: tl.constexpr):
    """Sum over what belongs to a channel."""
    if PLANES:
        return tl.sum(tl.sum(values, 0), 0)
    else:
        return tl.sum(values, 0, keep_dims=True)


@triton.jit
def any_of(flags, PLANES: tl.constexpr):
    """Tell whether one flag is set."""
    if PLANES:
        return flags
    else:
        return tl.max(tl.max(flags.to(tl.int32), 1), 0) > 0


@triton.jit
def pivot_of(x, inside, PLANES: tl.constexpr):
    """Return a value near the mean of each channel of a tile, and whether all are equal to it."""
    low = tl.where(inside, x, float("inf"))
    high = tl.where(inside, x, float("-inf"))
    if PLANES:
        low = tl.min(tl.min(low, 0), 0)
        high = tl.max(tl.max(high, 0), 0)
    else:
        low = tl.min(low, 0, keep_dims=True)
        high = tl.max(high, 0, keep_dims=True)
    mean = total_of(tl.where(inside, x, 0.0), PLANES) / total_of(inside.to(x.dtype), PLANES)
    return tl.minimum(tl.maximum(mean, low), high), low == high


@triton.jit
def moments_from_sums(count, pivot, s, q, constant, valid, PLANES: tl.constexpr):
    """Return mean, Σ(x−mean)² and whether to doubt them, from the sums of d = x − pivot and d²."""
    s = s.to(tl.float64)
    q = q.to(tl.float64)
    mean = s / count
    m2 = q - s * mean
    m2 = tl.where(m2 < 0, 0.0, m2)
    sound = (m2 < LARGEST) & (m2 > count * SMALLEST)
    doubtful = valid & ~(constant | sound)
    return pivot.to(tl.float64) + mean, m2, any_of(doubtful, PLANES)


@triton.jit
def moments_of_part(
    x, block, first, last, valid, rows, cols, channels,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return number, mean and Σ(x−mean)² of the values of some tiles."""
    begin, offset, inside = tile_at(first, block, rows, cols, channels, PLANES, ROWS, COLS)
    pivot, _ = pivot_of(tl.load(x + begin + offset, inside, 0).to(T), inside, PLANES)
    sums = tl.zeros([ROWS, COLS], T)
    squares = tl.zeros([ROWS, COLS], T)
    number = first * 0
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.where(inside, tl.load(x + begin + offset, inside, 0).to(T) - pivot, 0.0)
        sums += d
        squares += d * d
        number += values_in(tile, rows, cols, PLANES, ROWS, COLS)
    count = number.to(tl.float64)
    s = total_of(sums.to(tl.float64), PLANES)
    q = total_of(squares.to(tl.float64), PLANES)
    constant = (q == 0) & (total_of(tl.abs(sums), PLANES) == 0)
    mean, m2, doubtful = moments_from_sums(count, pivot, s, q, constant, valid, PLANES)
    if doubtful:
        mean, m2 = careful_moments(
            x, block, first, last, count, rows, cols, channels, PLANES, ROWS, COLS
        )
    return count, mean, m2


@triton.jit
def careful_moments(
    x, block, first, last, count, rows, cols, channels,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return mean and Σ(x−mean)² in float64 and two passes."""
    sums = tl.zeros([ROWS, COLS], tl.float64)
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        sums += tl.load(x + begin + offset, inside, 0).to(tl.float64)
    mean = total_of(sums, PLANES) / count
    squares = tl.zeros([ROWS, COLS], tl.float64)
    for tile in tl.range(first, last, num_stages=STAGES):
        begin, offset, inside = tile_at(tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        d = tl.where(inside, tl.load(x + begin + offset, inside, 0).to(tl.float64) - mean, 0.0)
        squares += d * d
    return mean, total_of(squares, PLANES)


@triton.jit
def put_moments(partial, part, parts, slot, slots, valid, count, mean, m2):
    """Leave what a part found for others to merge."""
    at = partial + part * slots + slot
    tl.store(at, count + mean * 0, valid)
    tl.store(at + parts * slots, mean, valid)
    tl.store(at + 2 * parts * slots, m2, valid)


@triton.jit
def at_parts(
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
def over_parts(values, PLANES: tl.constexpr):
    """Sum over the parts."""
    if PLANES:
        return tl.sum(values, 0)
    else:
        return tl.sum(values, 0, keep_dims=True)


@triton.jit
def merged_moments(
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
        at, there = at_parts(start, partial, parts, channel, valid, channels, PLANES, RUN, EACH)
        # Past the first cache, which does not notice what other programs wrote.
        counts = tl.load(at, there, 0, cache_modifier=".cg")
        means = tl.load(at + size, there, 0, cache_modifier=".cg")
        squares = tl.load(at + 2 * size, there, 0, cache_modifier=".cg")
        total = n + over_parts(counts, PLANES)
        merged = (n * mean + over_parts(counts * means, PLANES)) / total
        old = mean - merged
        new = means - merged
        m2 += n * old * old + over_parts(squares + counts * new * new, PLANES)
        n = total
        mean = merged
    return mean, m2 / n


@triton.jit
def merged_sums(
    partial, parts, channel, valid, channels,
    PLANES: tl.constexpr, RUN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Return the two sums of each channel."""
    EACH: tl.constexpr = MERGED if PLANES else MERGED // COLS
    size = parts * channels * RUN
    first = channel.to(tl.float64) * 0
    second = first
    for start in range(0, parts * RUN, EACH):
        at, there = at_parts(start, partial, parts, channel, valid, channels, PLANES, RUN, EACH)
        first += over_parts(tl.load(at, there, 0, cache_modifier=".cg"), PLANES)
        second += over_parts(tl.load(at + size, there, 0, cache_modifier=".cg"), PLANES)
    return first, second


@triton.jit
def affine(mean, var, weight, bias, channel, valid, EPS: tl.constexpr, T: tl.constexpr):
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
def put_bits(
    gate,
    bits,
    tile,
    block,
    rows,
    cols,
    channels,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Pack a tile of booleans, eight to a byte."""
    begin, offset, inside = tile_at(
        tile, block, rows, tl.cdiv(cols, 8), channels, PLANES, ROWS, COLS // 8
    )
    eights = tl.reshape(bits.to(tl.int32), [ROWS, COLS // 8, 8])
    packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
    tl.store(gate + begin + offset, packed.to(tl.uint8), inside)


@triton.jit
def get_bits(
    gate,
    tile,
    block,
    rows,
    cols,
    channels,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Open what put_bits packed."""
    begin, offset, inside = tile_at(
        tile, block, rows, tl.cdiv(cols, 8), channels, PLANES, ROWS, COLS // 8
    )
    packed = tl.load(gate + begin + offset, inside, 0).to(tl.int32)
    eights = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eights, [ROWS, COLS]) != 0


@triton.jit
def finish_forward(
    x, residual, y, gate, centre, scale, shift, begin, offset, inside,
    tile, block, rows, cols, channels,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Normalise the values x of a tile and write what follows from them."""
    z = tl.fma(x.to(T) - centre, tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
    if residual is not None:
        z += tl.load(residual + begin + offset, inside, 0).to(T)
    if gate is not None:
        bits = is_open(z, ACTIVATION) & inside
        put_bits(gate, bits, tile, block, rows, cols, channels, PLANES, ROWS, COLS)
    tl.store(y + begin + offset, activate(z, ACTIVATION).to(y.dtype.element_ty), inside)


@triton.jit
def dz_of(
    dy, x, residual, gate, centre, scale, shift, begin, offset, inside,
    tile, block, rows, cols, channels,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return dz of a tile, whose x less its centre is given."""
    dz = tl.load(dy + begin + offset, inside, 0).to(T)
    if gate is not None:
        bits = get_bits(gate, tile, block, rows, cols, channels, PLANES, ROWS, COLS)
        dz = through_gate(dz, bits, ACTIVATION)
    elif ACTIVATION != NONE:
        z = tl.fma(x, tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))
        if residual is not None:
            z += tl.load(residual + begin + offset, inside, 0).to(T)
        dz = through(dz, z, ACTIVATION)
    return dz
