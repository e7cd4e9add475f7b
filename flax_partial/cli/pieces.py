"""Data that a command goes through piece by piece, in little memory whatever its size."""

from collections.abc import Callable, Iterator, Sequence

from flax_partial.format.model import Leaf, Region
from flax_partial.loading.batches import batches

_AT_ONCE_BYTES = 64 << 20  # reading, or writing, takes about as much again


def in_batches(
    leaves: Sequence[Leaf], progress: Callable[[int, int], None]
) -> Iterator[list[Region]]:
    """Yields the data of the array leaves, at most about 64 MiB at once.

    Args:
      leaves: The leaves, in the order in which they are wanted.
      progress: Called after each batch with how many bytes of how many are done.

    Yields:
      Regions: each a leaf, the start of a box of it, and the box's shape.
    """
    return batches(leaves, most_bytes=_AT_ONCE_BYTES, progress=progress)
