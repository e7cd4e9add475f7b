"""Which process writes which piece of an array that several of them hold replicas of.

Each derives it from the array's name and sharding, and all derive the same, without messages. A
box that is large enough is cut along an axis, a piece for each process that holds it; others are
dealt out whole, by a hash of the name, so that of many leaves each process writes as much.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from flax_partial import cutting
from flax_partial.distributed import agreement
from flax_partial.format.chunks import Shape, slices

# Up to so many processes have a piece each, of at least so many bytes; of more of them some have,
# of at least a quarter of a chunk: each piece is one in the tables, all of which finalize reads.
_FEW_PROCESSES = 16
_LEAST_BYTES = 16 * 1024
_EVEN = 1.05  # how much larger than others the largest piece may be


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that this process writes.

    Attributes:
      shard: Position, among this process's shards, of the one that holds it.
      start: Where it begins in the array.
      offset: Where it begins in the shard.
      shape: Its shape.
      is_whole: Whether it is all of the shard.
    """

    shard: int
    start: Shape
    offset: Shape
    shape: Shape
    is_whole: bool

    def data_of(self, array: jax.Array) -> np.ndarray | jax.Array:
        """Returns the piece's data, and waits for no computation."""
        data = array.addressable_data(self.shard)
        if self.is_whole:
            return data
        (device,) = data.devices()
        is_ready: bool = data.is_ready()  # type: ignore[attr-defined] # of every concrete array
        if device.platform == "cpu" and is_ready:
            return np.asarray(data)[slices(self.offset, self.shape)]
        return cutting.cut(data, self.offset, self.shape)


@dataclass(frozen=True, slots=True)
class Shares:
    """What this process writes of an array, and how all of them cut it.

    Attributes:
      pieces: What it writes; may be nothing.
      unit: Shape of the smallest box that any of them writes.
      writers: Which processes write some of the array, as ranges: the first, and the one after the
        last. Only the first process that holds some of it, and process 0, list it; finalize
        reports what none has written.
    """

    pieces: tuple[Piece, ...]
    unit: Shape
    writers: tuple[tuple[int, int], ...]


def shares_of(
    array: jax.Array, name: str, *, rows_at: Shape, pinned: frozenset[int], chunk_bytes: int
) -> Shares | None:
    """Returns what this process writes of an array; None if no two processes hold the same of it.

    Args:
      array: The array, or rows of one that is saved in pieces.
      name: The leaf's name.
      rows_at: Where these rows begin in the leaf.
      pinned: Axes along which rows are cut, so that chunks have length 1: no piece depends on how
        many there are.
      chunk_bytes: Wanted size of a chunk, in bytes.
    """
    if agreement.count() == 1 or isinstance(array.sharding, SingleDeviceSharding):
        return None
    holders, most, lowest = _holders(array.sharding, array.shape)
    if most == 1 or not array.size:
        return None
    box = array.sharding.shard_shape(array.shape)
    row_sizes = (size for axis, size in enumerate(box) if axis not in pinned)
    row_bytes = array.dtype.itemsize * math.prod(row_sizes)
    cut = _cut(box, array.shape, pinned, _count_pieces(most, row_bytes, chunk_bytes))
    unit = tuple(cut.length if axis == cut.axis else size for axis, size in enumerate(box))
    pieces = []
    seen = set()
    for number, shard in enumerate(array.addressable_shards):
        start = tuple(index.start or 0 for index in shard.index)
        if start in seen:
            continue
        seen.add(start)
        text = _text(name, start, rows_at)
        turn = _turn(holders[start], agreement.index(), cut.pieces, text)
        if turn:
            pieces.append(_piece(number, start, box, cut, turn))
    writers: set[int] = set()
    if agreement.index() in (0, lowest):
        for start, processes in holders.items():
            text = _text(name, start, rows_at)
            writers.update(_writers(processes, cut.pieces, text))
    return Shares(tuple(pieces), unit, _ranges(sorted(writers)))


def _text(name: str, start: Shape, rows_at: Shape) -> str:
    """What identifies a box among all of a save, the same in all processes."""
    return f"{name}{[a + b for a, b in zip(start, rows_at, strict=True)]}"


@lru_cache(maxsize=1024)
def _holders(sharding: Sharding, shape: Shape) -> tuple[dict[Shape, tuple[int, ...]], int, int]:
    """Returns the processes that hold each box, ascending, by its start.

    And how many hold one at most, and the lowest process of all.
    """
    found: dict[Shape, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start = tuple(cut.start or 0 for cut in index or ())
        found.setdefault(start, set()).add(_process_of(device))
    holders = {start: tuple(sorted(processes)) for start, processes in found.items()}
    return holders, max(map(len, holders.values())), min(map(min, holders.values()))


def _process_of(device: Any) -> int:
    return int(device.process_index)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How boxes are cut: along which axis, the length of a piece, and how many there are."""

    axis: int
    length: int
    pieces: int


def _count_pieces(most: int, box_bytes: int, chunk_bytes: int) -> int:
    """Into how many pieces to cut a box that at most so many processes hold."""
    least_bytes = _LEAST_BYTES if most <= _FEW_PROCESSES else max(chunk_bytes // 4, 1)
    return max(1, min(most, box_bytes // least_bytes))


@lru_cache(maxsize=4096)
def _cut(box: Shape, shape: Shape, pinned: frozenset[int], pieces: int) -> _Cut:
    """Cuts a box along the first axis that can be cut evenly; where there is none, not at all.

    Along an axis that is sharded all pieces are of one length, since chunks are.
    """
    for axis, size in enumerate(box):
        if axis in pinned or pieces <= 1:
            continue
        length = -(-size // pieces)
        is_exact = size % length == 0 or size == shape[axis]
        if is_exact and length * pieces <= _EVEN * size:
            return _Cut(axis, length, -(-size // length))
    return _Cut(-1, 0, 1)


def _turn(processes: tuple[int, ...], process: int, pieces: int, text: str) -> range:
    """Returns which of a box's pieces a process writes."""
    count = len(processes)
    turn = (processes.index(process) + zlib.crc32(text.encode())) % count
    return range(turn * pieces // count, (turn + 1) * pieces // count)


def _writers(processes: tuple[int, ...], pieces: int, text: str) -> list[int]:
    """Returns the processes that have such a turn."""
    count = len(processes)
    if pieces >= count:
        return list(processes)
    first = zlib.crc32(text.encode())
    turns = (-(-(piece + 1) * count // pieces) - 1 for piece in range(pieces))
    return [processes[(turn - first) % count] for turn in turns]


def _piece(shard: int, start: Shape, box: Shape, cut: _Cut, turn: range) -> Piece:
    if len(turn) == cut.pieces:
        return Piece(shard, start, (0,) * len(box), box, is_whole=True)
    low, high = turn.start * cut.length, min(turn.stop * cut.length, box[cut.axis])
    axes = range(len(box))
    offset = tuple(low if axis == cut.axis else 0 for axis in axes)
    return Piece(
        shard,
        tuple(a + b for a, b in zip(start, offset, strict=True)),
        offset,
        tuple(high - low if axis == cut.axis else box[axis] for axis in axes),
        is_whole=False,
    )


def _ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as ranges."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = ranges[-1][0], number + 1
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)
