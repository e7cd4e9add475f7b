"""The bytes of arrays, and their digests."""

from collections.abc import Iterator

import numpy as np
import xxhash

from flax_partial.format.chunks import Shape, chunk_regions


def digest(data: bytes | memoryview) -> str:
    """xxh3-128 of `data`, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digests_of(array: np.ndarray, chunk: Shape) -> Iterator[str]:
    """Yields the digest of each chunk of a box's data, in C order, without padding."""
    if array.shape == chunk:  # by far the most common, and cheaper than the general case
        yield digest(bytes_of(array).data)
        return
    for region in chunk_regions(array.shape, chunk):
        yield digest(bytes_of(array[region]).data)


def bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order, on one axis; the array's own memory where that has them."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
