"""Boxes of an array and the regular grid of chunks that divides them. Pure arithmetic.

A *box* is a range of indices, `start` and `shape` along each axis. Every box that is saved is a
union of whole chunks (the last chunk along an axis may stick out of the array), so that parts which
hold different boxes of one leaf never share a chunk. Chunks are slabs: all axes after the one that
is cut are whole, so that a chunk of a contiguous box is contiguous.
"""

import math
from collections.abc import Iterator

Shape = tuple[int, ...]


def choose_chunk_shape(
    shape: Shape, *, unit: Shape, pinned: frozenset[int], itemsize: int, target_bytes: int
) -> Shape:
    """Returns the chunk shape of a leaf, about `target_bytes` large.

    Args:
      shape: Global shape of the leaf.
      unit: Shape of the smallest box that is ever saved of it: a shard's, or `shape`. Along an axis
        where it is smaller than `shape`, chunks divide it exactly.
      pinned: Axes along which a chunk has length 1 (`Slice` saves them in ranges of any length).
      itemsize: Size of an element, in bytes.
      target_bytes: Wanted size of a chunk, in bytes.
    """
    chunk = [1 if axis in pinned else max(size, 1) for axis, size in enumerate(unit)]
    for axis, size in enumerate(chunk):
        row_bytes = itemsize * math.prod(chunk[axis + 1 :])
        if size * row_bytes <= target_bytes:
            break
        if axis not in pinned:
            exact = unit[axis] != shape[axis]
            chunk[axis] = _slab_length(size, max(target_bytes // row_bytes, 1), exact=exact)
    return tuple(chunk)


def _slab_length(size: int, wanted: int, *, exact: bool) -> int:
    """Returns a length near `wanted` that divides `size`; one that does not, where it may.

    A slab that divides the array needs no padding; padding at the end costs up to one slab, so it
    is taken only where every divisor is less than a quarter, or more than four times, too far off.
    """
    divisors = _divisors(size)
    best = min(divisors, key=lambda length: abs(math.log(length / wanted)))
    if exact or wanted / 4 <= best <= wanted * 4:
        return best
    return wanted


def _divisors(size: int) -> list[int]:
    low = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0]
    return low + [size // number for number in reversed(low)]


def chunk_counts(box_shape: Shape, chunk: Shape) -> Shape:
    """Number of chunks along each axis of a box."""
    return tuple(-(-size // step) for size, step in zip(box_shape, chunk, strict=True))


def chunk_regions(box_shape: Shape, chunk: Shape) -> Iterator[tuple[slice, ...]]:
    """Yields where each chunk of a box lies within the box, in C order."""
    counts = chunk_counts(box_shape, chunk)
    for index in _indices(counts):
        yield tuple(
            slice(i * step, min((i + 1) * step, size))
            for i, step, size in zip(index, chunk, box_shape, strict=True)
        )


def count_leading(box_shape: Shape, chunk: Shape) -> int:
    """Number of whole chunks that follow one another at the beginning of a box's memory."""
    cut = _cut_axis(box_shape, chunk)
    if cut is None:
        return 1
    if any(length != 1 for length in chunk[:cut]):
        return 0
    rows = 1 if box_shape[cut] % chunk[cut] else math.prod(box_shape[:cut])
    return rows * (box_shape[cut] // chunk[cut])


def are_in_order(box_shape: Shape, chunk: Shape) -> bool:
    """Whether a box's memory is its chunks, one after another, but for the padding of the last."""
    cut = _cut_axis(box_shape, chunk)
    if cut is None:
        return True
    is_padded_within = box_shape[cut] % chunk[cut] and math.prod(box_shape[:cut]) != 1
    return all(length == 1 for length in chunk[:cut]) and not is_padded_within


def _cut_axis(box_shape: Shape, chunk: Shape) -> int | None:
    """The last axis along which chunks are not as long as the box."""
    axes = range(len(chunk) - 1, -1, -1)
    return next((axis for axis in axes if chunk[axis] != box_shape[axis]), None)


def chunk_keys(prefix: str, start: Shape, box_shape: Shape, chunk: Shape) -> Iterator[str]:
    """Yields the database key of each chunk of a box, in C order (zarr3's default encoding)."""
    first = [at // step for at, step in zip(start, chunk, strict=True)]
    for index in _indices(chunk_counts(box_shape, chunk)):
        yield prefix + "/".join(["c", *(str(a + b) for a, b in zip(first, index, strict=True))])


def chunk_numbers(start: Shape, box_shape: Shape, chunk: Shape, shape: Shape) -> Iterator[int]:
    """Yields the position of each chunk of a box among all chunks of the array, in C order."""
    totals = chunk_counts(shape, chunk)
    first = [at // step for at, step in zip(start, chunk, strict=True)]
    for index in _indices(chunk_counts(box_shape, chunk)):
        number = 0
        for total, a, b in zip(totals, first, index, strict=True):
            number = number * total + a + b
        yield number


def covering_box(start: Shape, box_shape: Shape, chunk: Shape, shape: Shape) -> tuple[Shape, Shape]:
    """Returns start and shape of the smallest union of whole chunks that holds a box."""
    low = tuple(at - at % step for at, step in zip(start, chunk, strict=True))
    high = (
        min(-(-(at + size) // step) * step, whole)
        for at, size, step, whole in zip(start, box_shape, chunk, shape, strict=True)
    )
    return low, tuple(b - a for a, b in zip(low, high, strict=True))


def slices(start: Shape, box_shape: Shape) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(at, at + size) for at, size in zip(start, box_shape, strict=True))


def _indices(counts: Shape) -> Iterator[Shape]:
    if len(counts) <= 1:  # by far the most common, and cheaper than the general case
        yield from ((i,) for i in range(counts[0])) if counts else ((),)
        return
    for number in range(math.prod(counts)):
        index, rest = [], number
        for count in reversed(counts):
            rest, position = divmod(rest, count)
            index.append(position)
        yield tuple(reversed(index))
