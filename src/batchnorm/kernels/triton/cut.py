"""How a tensor is cut into tiles and parts. No device is needed to think about it.

The sizes are deduced, for want of measurements: 2048 elements are 16 for each of 128 threads, two
wide loads of bfloat16; with two accumulators an element, four programs share a multiprocessor,
and with three tiles each on their way (:data:`.tiles.STAGES`) that is 48 kB of bfloat16.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

TILE = 2048
PROGRAMS_PER_PROCESSOR = 4
COLUMNS = 64  # 128 bytes of bfloat16
LINE_BYTES = 128  # of the cache; less at a time would be fetched in halves
# Lanes without work take their turns: 56 × 56 in tiles of 2048 would be a third more of them.
PADDING = 1 / 16
# What a program keeps in registers: a quarter of those of a multiprocessor, and no more values
# than 16 warps can widen to single precision at once. 0: nothing.
HELD_BYTES = int(os.environ.get("BATCHNORM_TRITON_HELD_BYTES", 1 << 16))
HELD_ELEMENTS = 1 << 14
ELEMENTS_PER_WARP = 1024


def power_of_2(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a/b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class View:
    """A dense tensor as the kernels see it."""

    planes: bool
    rows: int
    cols: int
    channels: int
    run: int = 1

    @property
    def slots(self) -> int:
        """The number of partial results of a part."""
        return self.channels * self.run


@dataclass(frozen=True)
class Cut:
    """Tiles of rows × cols, and the parts that they are dealt out to."""

    view: View
    rows: int
    cols: int
    parts: int

    @property
    def programs(self) -> int:
        """One for each part of each block of channels."""
        view = self.view
        return self.parts * (view.channels if view.planes else ceil_div(view.cols, self.cols))


def _tiles(view: View, rows: int, cols: int) -> int:
    down = ceil_div(view.rows, rows)
    return down * ceil_div(view.cols, cols) if view.planes else down


def _width_in_planes(length: int, itemsize: int) -> int:
    """Return the widest tile that pads a row little more than the best does."""
    most = min(max(power_of_2(length), 8), TILE)
    widths = [w for w in (1 << i for i in range(3, 12)) if w * itemsize >= LINE_BYTES and w <= most]
    padded = {w: ceil_div(length, w) * w for w in widths or [most]}
    return max(w for w, n in padded.items() if n <= min(padded.values()) * (1 + PADDING))


def streamed(view: View, itemsize: int, processors: int) -> Cut:
    """Cut so that every processor has several programs, if there is so much to do."""
    if view.planes:
        cols = _width_in_planes(view.cols, itemsize)
    else:
        cols = min(max(power_of_2(view.cols), 8), COLUMNS)
    rows = min(power_of_2(view.rows), TILE // cols)
    cut = Cut(view, rows, cols, 1)
    tiles = _tiles(view, rows, cols)
    wanted = ceil_div(processors * PROGRAMS_PER_PROCESSOR, cut.programs)
    each = ceil_div(tiles, wanted)
    return Cut(view, rows, cols, ceil_div(tiles, each))


def held(view: View, itemsize: int, tensors: int, processors: int) -> Cut | None:
    """Cut so that a program holds its share of so many tensors, or say that it cannot."""
    elements = min(HELD_BYTES // (itemsize * tensors), HELD_ELEMENTS)
    if view.run > 1 or elements < 8:
        return None
    cols = max(power_of_2(view.cols), 8)
    if not view.planes:
        cols = min(cols, COLUMNS)
    if cols > elements:
        return None
    rows = min(power_of_2(view.rows), elements // cols)
    cut = Cut(view, rows, cols, _tiles(view, rows, cols))
    if cut.parts > 1 and cut.programs > processors:
        return None
    return cut
