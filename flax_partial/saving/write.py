"""Boxes of leaves in host memory -> a part's data: what lies in its files, what in its table.

Each box is cut into its chunks, as zarr stores them. They go into the part's data file; small ones
stand in the table of contents itself, so that a save of small leaves writes one file. Where chunks
of a box follow one another in memory they are appended as one run, and nothing is copied.

Where there are more cores than two, a large save is cut into several files, which as many threads
write and digest: a file that many write at once is locked by one of them at a time.

What an earlier checkpoint holds already is not written: that one's data file gets a second name in
the part, `data.1` and so on. Either checkpoint may go, and the other one still has it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice, repeat
from typing import BinaryIO

import numpy as np

from flax_partial.format.chunks import Shape, chunk_counts, chunk_regions, count_leading
from flax_partial.format.digests import bytes_of, digest, digests_of
from flax_partial.format.model import (
    INLINE_BYTES,
    Box,
    Leaf,
    Place,
    data_file_bytes,
    size_of,
)
from flax_partial.saving.reuse import Earlier, Plan, Shared
from flax_partial.sessions import workers
from flax_partial.storage.place import NewPart, Sink
from flax_partial.storage.tensorstore_io import encoded_chunks

# From here on digests are taken while the disk writes: 1 GiB takes 0.1 s to digest, 0.6 to write.
_BESIDE_BYTES = 4 << 20

_TOO_FEW_WRITERS = 2  # to cut a save among them
_LEAST_FILE_BYTES = 64 << 20

HostBoxes = Sequence[tuple[Leaf, Iterable[np.ndarray]]]
"""Leaves, each with the data of its boxes, which may have to be waited for."""

Digests = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a save's data.

    Attributes:
      leaves: The leaves with digests and places, in the order of the save.
      reused: Positions of those that were not written.
      bytes: How much was written into data files, in bytes.
    """

    leaves: tuple[Leaf, ...]
    reused: frozenset[int]
    bytes: int


def write_part(
    part: NewPart,
    boxes: HostBoxes,
    *,
    first_file: int,
    earlier: Earlier | None,
    checksum: bool,
    durable: bool,
    check: Callable[[], None],
) -> Written:
    """Writes a part's data files, beside which there may be linked ones.

    Args:
      part: The part.
      boxes: Each leaf with the data of each of its boxes, in the order of `leaf.boxes`, C order.
      first_file: Number of the first file that is not there yet, from 1.
      earlier: What may be shared; it may also be gone by now.
      checksum: Whether to take a digest of every chunk. Without, everything is written.
      durable: Whether the data is on disk at the return; the names of its files may not be yet.
      check: Called between pieces of at most 64 MiB; what it raises ends the writing.

    Raises:
      OSError: Writing failed; the part may hold some of the data, and no table of contents.
    """
    plan = Plan()
    if earlier is not None and checksum:
        plan = earlier.plan([leaf for leaf, _ in boxes], [data for _, data in boxes])
    done = _link_files(part, plan.shared, first_file=first_file, durable=durable)
    reused = frozenset(done)
    new = [at for at in range(len(boxes)) if at not in reused and at not in plan.apart]
    numbers = chain([0] if new else [], count(first_file + len(plan.shared)))
    most = _most_files(part, durable=durable)
    groups = [group for one in (new, sorted(plan.apart)) for group in _cut(one, boxes, most)]
    works = [
        partial(
            _write_file,
            part,
            [boxes[at] for at in group],
            file=file,
            checksum=checksum,
            durable=durable,
            is_alone=len(groups) == 1,
            check=check,
        )
        for file, group in zip(numbers, groups, strict=False)
    ]
    for group, leaves in zip(groups, workers.spread(works), strict=True):
        done |= zip(group, leaves, strict=True)
    written = [leaf for at, leaf in done.items() if at not in reused]
    return Written(
        leaves=tuple(done[at] for at in range(len(boxes))),
        reused=reused,
        bytes=sum(data_file_bytes(written).values()),
    )


def _most_files(part: NewPart, *, durable: bool) -> int:
    """Into how many files a save may be cut."""
    if workers.MOST_WRITERS == _TOO_FEW_WRITERS:  # the second one takes digests
        return 1
    threads, most = workers.threads_per_save(), part.most_files(durable=durable)
    return threads if most is None else min(threads, most)


def _cut(positions: Sequence[int], boxes: HostBoxes, most: int) -> list[list[int]]:
    """Cuts positions of leaves, in their order, into groups of about the same size in bytes."""
    sizes = [_bytes_of_boxes(boxes[at][0]) for at in positions]
    total = sum(sizes)
    files = max(1, min(most, total // _LEAST_FILE_BYTES))
    groups: list[list[int]] = [[] for _ in range(files)]
    before = 0
    for at, size in zip(positions, sizes, strict=True):
        middle = before + size // 2
        groups[min(files - 1, middle * files // max(total, 1))].append(at)
        before += size
    return [group for group in groups if group]


def _link_files(
    part: NewPart, shared: Sequence[Shared], *, first_file: int, durable: bool
) -> dict[int, Leaf]:
    """Gives files a second name in a part.

    Args:
      part: The part.
      shared: The files.
      first_file: Number of the first of them in the part, from 1.
      durable: Whether their data is to be on the disk at the return; their names may not be yet.

    Returns:
      Position of each leaf that need not be written any more -> the leaf, in its file.
    """
    done: dict[int, Leaf] = {}
    for file, one in enumerate(shared, start=first_file):
        sync = durable and not one.file.durable
        if part.link(one.file.path, file, size=one.file.bytes, sync=sync):
            done |= {at: leaf.with_boxes(leaf.boxes, file=file) for at, leaf in one.leaves.items()}
    return done


def link_held(part: NewPart, held: Sequence[tuple[Shared, BinaryIO]]) -> dict[int, Leaf]:
    """Gives open files a second name in a part, as `data.1` and so on, or copies them.

    Returns:
      Position of each leaf that they hold -> the leaf, in its file.
    """
    done: dict[int, Leaf] = {}
    for number, (one, file) in enumerate(held, start=1):
        if not part.link(one.file.path, number, size=one.file.bytes, sync=False):
            part.copy(file, number)
        done |= {at: leaf.with_boxes(leaf.boxes, file=number) for at, leaf in one.leaves.items()}
    return done


def _write_file(
    part: NewPart,
    boxes: HostBoxes,
    *,
    file: int,
    checksum: bool,
    durable: bool,
    is_alone: bool,
    check: Callable[[], None],
) -> tuple[Leaf, ...]:
    """Writes boxes of leaves into the data file of that number; small chunks into the table.

    One that is not alone has as many threads beside it as there are to be.
    """
    large = [one for one in boxes if not _is_inline(one[0])]
    size = sum(_bytes_of_boxes(leaf) for leaf, _ in large)
    if not size:
        return tuple([_inline(leaf, data, checksum=checksum) for leaf, data in boxes])
    new = part.new_file(file, expected_bytes=size, durable=durable, check=check)
    if checksum and size >= _BESIDE_BYTES and is_alone and _has_free_writers():
        with workers.beside(lambda: _digests(large)) as digests:
            places = _write_data(new, large)
            found = digests.result()
    else:
        places = _write_data(new, large)
        found = _digests(large) if checksum else [[() for _ in leaf.boxes] for leaf, _ in large]
    done = map(_with_chunks, [leaf for leaf, _ in large], found, places, repeat(file))
    return tuple(
        [
            _inline(leaf, data, checksum=checksum) if _is_inline(leaf) else next(done)
            for leaf, data in boxes
        ]
    )


def _has_free_writers() -> bool:
    return workers.MOST_WRITERS == _TOO_FEW_WRITERS or workers.threads_per_save() > 1


def _write_data(new: Sink, boxes: HostBoxes) -> list[list[tuple[Place, ...]]]:
    """Writes chunks into a data file; returns where they are."""
    with new:
        encoded = encoded_chunks(
            (leaf, array) for leaf, data in boxes if leaf.compression for array in data
        )
        places = [
            [tuple(_places(leaf, array, new, encoded)) for array in data] for leaf, data in boxes
        ]
        new.finish()
    return places


def _bytes_of_boxes(leaf: Leaf) -> int:
    """Size of a leaf's boxes, in bytes, which does not wait for them."""
    return sum(size_of(leaf.dtype, box.shape) for box in leaf.boxes)


def _is_inline(leaf: Leaf) -> bool:
    return leaf.compression is None and leaf.chunk_bytes <= INLINE_BYTES


def _inline(leaf: Leaf, data: Iterable[np.ndarray], *, checksum: bool) -> Leaf:
    """A leaf whose chunks, if it has any, stand in the table."""
    boxes = []
    for box, array in zip(leaf.boxes, data, strict=True):
        digests: Digests = ()
        if array.shape == leaf.chunk:  # by far the most common, and cheaper than the general case
            data_bytes = array.tobytes()
            chunks: tuple[Place, ...] = (data_bytes,)
            if checksum:
                digests = (digest(data_bytes),)
        else:
            chunks = tuple([one.tobytes() for one in _stored_chunks(array, leaf.chunk)])
            if checksum:
                digests = tuple(digests_of(array, leaf.chunk))
        boxes.append(Box(box.start, box.shape, digests, chunks))
    return leaf.with_boxes(tuple(boxes)) if boxes else leaf


def _digests(boxes: HostBoxes) -> list[list[Digests]]:
    return [[tuple(digests_of(array, leaf.chunk)) for array in data] for leaf, data in boxes]


def _with_chunks(
    leaf: Leaf, digests: Sequence[Digests], places: Sequence[tuple[Place, ...]], file: int
) -> Leaf:
    boxes = zip(leaf.boxes, digests, places, strict=True)
    return leaf.with_boxes(
        tuple([Box(box.start, box.shape, found, placed) for box, found, placed in boxes]),
        file=file,
    )


def _places(leaf: Leaf, array: np.ndarray, file: Sink, encoded: Iterator[bytes]) -> Iterator[Place]:
    """Puts the chunks of a box where they belong, of `encoded` if so; yields where that is."""
    if leaf.compression is not None:
        for packed in islice(encoded, math.prod(chunk_counts(array.shape, leaf.chunk))):
            yield file.append(np.frombuffer(packed, np.uint8)), len(packed)
        return
    size = leaf.chunk_bytes
    leading = count_leading(array.shape, leaf.chunk)
    if leading:
        start = file.append(bytes_of(array)[: leading * size])
        yield from ((start + number * size, size) for number in range(leading))
    for chunk in _stored_chunks(array, leaf.chunk, skip=leading):
        yield file.append(chunk), size


def _stored_chunks(array: np.ndarray, chunk: Shape, *, skip: int = 0) -> Iterator[np.ndarray]:
    """Yields the bytes of each chunk of a box's data, in C order, but for the first `skip`."""
    if array.shape == chunk:
        if not skip and array.size:
            yield bytes_of(array)
        return
    for region in islice(chunk_regions(array.shape, chunk), skip, None):
        yield bytes_of(_padded(array[region], chunk))


def _padded(array: np.ndarray, shape: Shape) -> np.ndarray:
    """zarr stores the chunks at an array's end whole."""
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded
