"""Stored chunks -> the box of a leaf that they make, with their digests checked. Pure."""

import math
from collections.abc import Iterable

import numpy as np

from flax_partial.format.chunks import Shape, chunk_numbers, chunk_regions, covering_box, slices
from flax_partial.format.digests import digest, digests_of
from flax_partial.format.model import Box, Leaf


def whole_chunks(leaf: Leaf, start: Shape, shape: Shape) -> Box:
    """The smallest box of whole chunks around a box of a leaf."""
    return Box(*covering_box(start, shape, leaf.chunk, leaf.shape))


def assemble(leaf: Leaf, shape: Shape, chunks: Iterable[bytes]) -> np.ndarray:
    """Makes an array of its stored chunks, which are not compressed, in C order."""
    arrays = (np.frombuffer(chunk, leaf.numpy_dtype).reshape(leaf.chunk) for chunk in chunks)
    if leaf.is_one_chunk:
        return next(arrays).copy()  # what was read cannot be written to
    array = np.empty(shape, leaf.numpy_dtype)
    for chunk, region in zip(arrays, chunk_regions(shape, leaf.chunk), strict=True):
        array[region] = chunk[tuple(slice(cut.stop - cut.start) for cut in region)]
    return array


def checked_cut(
    leaf: Leaf, box: Box, array: np.ndarray, *, start: Shape, shape: Shape
) -> np.ndarray:
    """Cuts a box out of one of whole chunks whose digests are checked.

    Args:
      leaf: The leaf, one whole box.
      box: The box of whole chunks.
      array: Its data.
      start: Start of the box to cut out.
      shape: Its shape.

    Raises:
      ValueError: A chunk is not what was saved.
    """
    expected = leaf.boxes[0].digests
    if expected:
        numbers = chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape)
        for number, found in zip(numbers, digests_of(array, leaf.chunk), strict=True):
            require_digest(number, found, expected[number])
    if box.shape == shape:
        return array
    offset = tuple(a - b for a, b in zip(start, box.start, strict=True))
    return array[slices(offset, shape)].copy()


def read_inline(leaf: Leaf, start: Shape, shape: Shape) -> np.ndarray:
    """Makes a box of a leaf whose chunks stand in the table of contents.

    Raises:
      ValueError: A chunk is not what was saved.
    """
    places, digests = leaf.boxes[0].places, leaf.boxes[0].digests
    if shape == leaf.shape == leaf.chunk and isinstance(places[0], bytes):
        # As small leaves are: a quarter of the time.
        if digests:
            require_digest(0, digest(places[0]), digests[0])
        return np.ndarray(shape, leaf.numpy_dtype, places[0]).copy()
    if not math.prod(shape):
        return np.empty(shape, leaf.numpy_dtype)
    box = whole_chunks(leaf, start, shape)
    numbers = chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape)
    chunks = (place for number in numbers if isinstance(place := places[number], bytes))
    array = assemble(leaf, box.shape, chunks)
    return checked_cut(leaf, box, array, start=start, shape=shape)


def require_digest(number: int, found: str, expected: str) -> None:
    """Compares the digest of a chunk, by its number in the array, with the one that was saved.

    Raises:
      ValueError: They differ; none was saved where it is empty.
    """
    if expected and found != expected:
        raise ValueError(f"chunk {number} has digest {found}, and {expected} was saved")
