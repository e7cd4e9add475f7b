"""Boxes of leaves in host memory -> a part's data: what lies in its file, what in its table.

Each box is cut into its chunks, as zarr stores them. They go into the part's data file; small ones
stand in the table of contents itself, so that a save of small leaves writes one file. Where chunks
of a box follow one another in memory they are appended as one run, and nothing is copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np

from flax_partial import workers
from flax_partial.arrays import encoded_chunks
from flax_partial.chunks import Shape, chunk_regions, count_leading
from flax_partial.direct_io import NewFile
from flax_partial.part import DATA_FILE, INLINE_BYTES, Box, Leaf, Place, digests_of, flat

# From here on digests are taken while the disk writes: 1 GiB takes 0.1 s to digest, 0.6 to write.
_BESIDE_BYTES = 4 << 20

HostBoxes = Sequence[tuple[Leaf, Sequence[np.ndarray]]]
Digests = tuple[str, ...]


def write_part(
    directory: Path, boxes: HostBoxes, *, checksum: bool, durable: bool
) -> tuple[Leaf, ...]:
    """Writes boxes of leaves into a part's new directory.

    Args:
      directory: The part's directory.
      boxes: Each leaf with the data of each of its boxes, in the order of `leaf.boxes`, C order.
      checksum: Whether to take a digest of every chunk.
      durable: Whether the data is on disk at the return; the name of its file may not be yet.

    Returns:
      The leaves, their boxes with digests and places.

    Raises:
      OSError: Writing failed; the directory may hold part of the data, and no table of contents.
    """
    size = sum(array.nbytes for leaf, data in boxes if not _is_inline(leaf) for array in data)
    digests = None
    if checksum and size >= _BESIDE_BYTES:
        digests = workers.in_background(lambda: _digests(boxes))
    path = directory / DATA_FILE
    opened = NewFile(path, expected_bytes=size, durable=durable) if size else nullcontext()
    with opened as file:
        places = [[tuple(_places(leaf, array, file)) for array in data] for leaf, data in boxes]
        if file is not None:
            file.finish()
    found = digests.result() if digests else _digests(boxes) if checksum else _no_digests(boxes)
    return tuple(map(_with_chunks, (leaf for leaf, _ in boxes), found, places))


def _is_inline(leaf: Leaf) -> bool:
    return leaf.compression is None and leaf.chunk_bytes <= INLINE_BYTES


def _digests(boxes: HostBoxes) -> list[list[Digests]]:
    return [[tuple(digests_of(array, leaf.chunk)) for array in data] for leaf, data in boxes]


def _no_digests(boxes: HostBoxes) -> list[list[Digests]]:
    return [[() for _ in data] for _, data in boxes]


def _with_chunks(
    leaf: Leaf, digests: Sequence[Digests], places: Sequence[tuple[Place, ...]]
) -> Leaf:
    if not places:
        return leaf
    boxes = zip(leaf.boxes, digests, places, strict=True)
    return leaf.with_boxes(
        tuple([Box(box.start, box.shape, found, placed) for box, found, placed in boxes])
    )


def _places(leaf: Leaf, array: np.ndarray, file: NewFile | None) -> Iterator[Place]:
    """Puts the chunks of a box where they belong; yields where that is."""
    if file is None or _is_inline(leaf):
        yield from (chunk.tobytes() for chunk in _stored_chunks(array, leaf.chunk))
        return
    if leaf.compression is not None:
        for encoded in encoded_chunks(leaf, array):
            yield file.append(np.frombuffer(encoded, np.uint8)), len(encoded)
        return
    size = leaf.chunk_bytes
    leading = count_leading(array.shape, leaf.chunk)
    if leading:
        start = file.append(flat(array)[: leading * size])
        yield from ((start + number * size, size) for number in range(leading))
    for chunk in _stored_chunks(array, leaf.chunk, skip=leading):
        yield file.append(chunk), size


def _stored_chunks(array: np.ndarray, chunk: Shape, *, skip: int = 0) -> Iterator[np.ndarray]:
    """Yields the bytes of each chunk of a box's data, in C order, but for the first `skip`."""
    if array.shape == chunk:
        if not skip and array.size:
            yield flat(array)
        return
    for region in islice(chunk_regions(array.shape, chunk), skip, None):
        yield flat(_padded(array[region], chunk))


def _padded(array: np.ndarray, shape: Shape) -> np.ndarray:
    """zarr stores the chunks at an array's end whole."""
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded
