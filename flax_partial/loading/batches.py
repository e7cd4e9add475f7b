"""A checkpoint's data cut into batches that fit into memory, whatever the size of its leaves. Pure.

Every region is a union of whole chunks, so that each chunk is read, and checked, once. A chunk that
is larger than a batch, as Orbax writes them by default, is a batch by itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from flax_partial.format.chunks import Shape, chunk_regions
from flax_partial.format.model import Leaf, Region, size_of

T = TypeVar("T")

# What is at hand at once takes more memory than its data: JAX takes 1.2 KB for an array to be put.
MOST_AT_ONCE = 1024


def batches(
    leaves: Sequence[Leaf],
    *,
    most_bytes: int,
    progress: Callable[[int, int], None],
    cut: bool = True,
) -> Iterator[list[Region]]:
    """Yields all data of the array leaves, in order, at most about `most_bytes` at once.

    Args:
      leaves: The leaves; those without array data are left out.
      most_bytes: Size of a batch in memory; one chunk may be larger.
      progress: Called after each batch with how many bytes of how many are done.
      cut: Whether larger leaves are cut; else each is a batch by itself.

    Yields:
      Regions: each a leaf, the start of a box of it, and the box's shape.
    """
    largest = most_bytes if cut else max((leaf.bytes for leaf in leaves), default=0)
    found = (one for leaf in leaves if leaf.is_array for one in regions(leaf, largest))
    done, total = 0, sum(leaf.bytes for leaf in leaves)
    for batch in batched(found, region_bytes, most_bytes=most_bytes):
        yield batch
        done += sum(map(region_bytes, batch))
        progress(done, total)


def batched(
    items: Iterable[T], bytes_of: Callable[[T], int], *, most_bytes: int | None
) -> Iterator[list[T]]:
    """Yields items in order, some thousand, and at most about `most_bytes`, if any, at once."""
    if most_bytes is None:
        rest = iter(items)
        while batch := list(islice(rest, MOST_AT_ONCE)):
            yield batch
        return
    batch, size = [], 0
    for item in items:
        added = bytes_of(item)
        if batch and (size + added > most_bytes or len(batch) == MOST_AT_ONCE):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += added
    if batch:
        yield batch


def region_bytes(region: Region) -> int:
    """Size of a region in memory."""
    leaf, _, shape = region
    return size_of(leaf.dtype, shape)


def regions(leaf: Leaf, most_bytes: int) -> Iterator[Region]:
    """Cuts a leaf into boxes of whole chunks, in C order, each of at most about `most_bytes`."""
    if leaf.bytes <= most_bytes:
        yield leaf, (0,) * len(leaf.shape), leaf.shape
        return
    for box in chunk_regions(leaf.shape, _piece(leaf, most_bytes)):
        start = tuple(cut.start for cut in box)
        yield leaf, start, tuple(cut.stop - cut.start for cut in box)


def _piece(leaf: Leaf, most_bytes: int) -> Shape:
    """Takes chunks along the last axes first: such boxes have the longest runs of memory."""
    piece = list(leaf.chunk)
    left = most_bytes // (math.prod(piece) * leaf.numpy_dtype.itemsize)
    for axis in reversed(range(len(piece))):
        count = -(-leaf.shape[axis] // piece[axis])
        taken = max(1, min(count, left))
        piece[axis] *= taken
        left //= taken
        if taken < count:
            break
    return tuple(piece)
