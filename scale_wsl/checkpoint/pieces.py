"""Which elements of its shards a rank writes, and how a range of elements becomes boxes.

Every rule here is a function of a shard's name, shape and place alone: ranks share the work without a word, each
element is written exactly once, and no rank needs to know how another one is sharded.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from scale_wsl.shards import FlatShard, even_range

__all__ = ["Box", "Piece", "boxes", "owned_pieces", "owned_ranges"]

_SHARED_FROM = 4 << 20  # bytes; a replicated tensor is shared out among its holders in parts of about this size or more
_LARGEST = 64 << 20  # bytes of a piece, about: ranks and threads share the writing, and the checking, piece by piece

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in each dimension


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a tensor, as they are to be written.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start: the first element's place in the whole tensor, row-major.
        values: the elements, 1-D and contiguous.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self.values.numel() * self.values.element_size()


def owned_ranges(name: str, shard: FlatShard) -> list[tuple[int, int]]:
    """Ranges `[start, stop)` of the whole tensor that this rank writes, so that all holders write each element once.

    A small tensor goes whole to one of its holders, chosen by its name; a large one is shared out along its rows (or
    along a later dimension where it has too few of them), because parts of rows are more boxes, and more boxes are
    slower to write and to read.
    """
    length = shard.local.numel()
    if not length:
        return []
    if shard.copies == 1:
        return [(shard.start, shard.stop)]
    parts = min(shard.copies, max(1, length * shard.local.element_size() // _SHARED_FROM))
    first_holder = zlib.crc32(name.encode())
    shares = _cut(tuple(shard.shape), shard.start, shard.stop, parts)
    return [share for part, share in enumerate(shares) if (first_holder + part) % shard.copies == shard.copy]


def _cut(shape: tuple[int, ...], start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """About `parts` consecutive ranges, their inner borders between rows, or between those of a later dimension."""
    length = stop - start
    rows = [math.prod(shape[dimension:]) for dimension in range(1, len(shape) + 1)]
    grain = next((size for size in rows if 0 < size <= length // parts), 1)
    inner = [(start + even_range(length, parts, part)[0]) // grain * grain for part in range(1, parts)]
    bounds = [start, *(max(start, bound) for bound in inner), stop]
    return [(first, last) for first, last in pairwise(bounds) if first < last]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, Box]]:
    """Cut elements `[start, stop)` in row-major order into contiguous boxes, at most 2n - 1 of them in n dimensions.

    Yields:
        Start, stop and box of each, in order.
    """
    if start >= stop:
        return
    if not shape or (start == 0 and stop == math.prod(shape)):
        yield start, stop, ((0,) * len(shape), shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, row, start, stop)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, row, start, first * row)
    if first < last:
        inner = shape[1:]
        yield first * row, last * row, ((first, *(0,) * len(inner)), (last - first, *inner))
    if last * row < stop:
        yield from _in_row(shape, last, row, last * row, stop)


def _in_row(shape: tuple[int, ...], number: int, row: int, start: int, stop: int) -> Iterator[tuple[int, int, Box]]:
    before = number * row
    for first, last, (offsets, sizes) in boxes(shape[1:], start - before, stop - before):
        yield first + before, last + before, ((number, *offsets), (1, *sizes))


def owned_pieces(name: str, shard: FlatShard) -> Iterator[tuple[Piece, Box]]:
    """What this rank writes of a shard, box by box."""
    shape = tuple(shard.shape)
    for owned in owned_ranges(name, shard):
        parts = -(-(owned[1] - owned[0]) * shard.local.element_size() // _LARGEST)
        for first, last, box in (box for cut in _cut(shape, *owned, parts) for box in boxes(shape, *cut)):
            yield Piece(name, shape, first, shard.local[first - shard.start : last - shard.start]), box
