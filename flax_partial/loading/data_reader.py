"""Reads chunks straight from the parts' data files, in parallel, and checks every digest.

The table of contents has their places (`Leaf.runs`). Each is read into the place that it has in
the array, and nothing else holds the data meanwhile: a device that shares the host's memory takes
the array over as it is, which is why it begins where devices want it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, groupby, islice
from typing import NamedTuple

import numpy as np

from flax_partial.format.assembly import require_digest
from flax_partial.format.chunks import (
    Shape,
    are_in_order,
    chunk_numbers,
    chunk_regions,
    covering_box,
    slices,
)
from flax_partial.format.digests import bytes_of, digest
from flax_partial.format.model import Leaf, Region, data_path
from flax_partial.loading.host_memory import HostMemory
from flax_partial.storage.place import DataFile, DataFiles


def read(
    files: DataFiles, parts: Sequence[str], regions: Iterable[Region], memory: HostMemory
) -> list[np.ndarray | Exception]:
    """Reads boxes of leaves that have runs.

    Args:
      files: The data files of the parts.
      parts: What they are called, as the leaves' runs number them.
      regions: Each a leaf, the box's start and its shape.
      memory: What the data is read into.

    Returns:
      For each region its data, C-contiguous and the caller's own; a `ValueError` where it is
      damaged, an `OSError` where the system refused to read it.
    """
    readings = [_Reading(files, parts, *region) for region in regions]
    tasks = [task for reading in readings for task in reading.begin(memory)]
    if len(tasks) <= 1 or sum(reading.bytes for reading in readings) < files.least_bytes:
        for task in tasks:
            task()
    else:
        _do_all(tasks, most=files.most_readers)
    return [reading.outcome(memory) for reading in readings]


def _do_all(tasks: Sequence[Callable[[], None]], *, most: int) -> None:
    """Does tasks on several threads; where it is interrupted, only those that have begun."""
    with ThreadPoolExecutor(min(most, len(tasks)), "flax_partial-read") as pool:
        try:
            for one in [pool.submit(task) for task in tasks]:
                one.result()
        except RuntimeError:  # the system, or an interpreter that is ending, starts no thread
            for task in tasks:
                task()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Segment(NamedTuple):
    """Chunks of a box that follow one another in a data file, and in the box.

    Attributes:
      path: The file, below `state/`.
      offset: Where the first of them begins, in bytes.
      first: Its position among the chunks of the box.
      chunks: How many they are.
    """

    path: str
    offset: int
    first: int
    chunks: int


class _Reading:
    """One box on its way into memory; the first error of its tasks is its outcome."""

    def __init__(
        self, files: DataFiles, parts: Sequence[str], leaf: Leaf, start: Shape, shape: Shape
    ) -> None:
        self._files, self._leaf = files, leaf
        self._start, self._shape = start, shape
        self._low, self._size = covering_box(start, shape, leaf.chunk, leaf.shape)
        self._numbers = list(chunk_numbers(self._low, self._size, leaf.chunk, leaf.shape))
        self._segments = list(_segments(leaf, self._numbers, parts, most_bytes=files.most_bytes))
        self._array = np.empty(0, leaf.numpy_dtype)
        self._error: Exception | None = None
        self.bytes = math.prod(self._size) * leaf.numpy_dtype.itemsize

    def begin(self, memory: HostMemory) -> list[Callable[[], None]]:
        """Takes memory, and returns what has to be done, in any order and on any thread."""
        try:
            for segment in self._segments:
                end = segment.offset + segment.chunks * self._leaf.chunk_bytes
                self._files.require(segment.path, end)
        except (ValueError, OSError) as error:
            self._error = error
            return []
        self._array = memory.empty(self._size, self._leaf.numpy_dtype)
        in_order = are_in_order(self._size, self._leaf.chunk)
        read_segment = self._read_in_order if in_order else self._read_apart
        return [partial(self._attempt, read_segment, segment) for segment in self._segments]

    def outcome(self, memory: HostMemory) -> np.ndarray | Exception:
        """What was read, once all is done."""
        if self._error is not None:
            return self._error
        if self._size == self._shape:
            return self._array
        offset = tuple(a - b for a, b in zip(self._start, self._low, strict=True))
        cut = memory.empty(self._shape, self._array.dtype)
        cut[...] = self._array[slices(offset, self._shape)]
        return cut

    def _attempt(
        self, read_segment: Callable[[_Segment, DataFile], None], segment: _Segment
    ) -> None:
        if self._error is not None:
            return
        try:
            with self._files.open(segment.path) as file:
                read_segment(segment, file)
        except (ValueError, OSError) as error:
            self._error = error

    def _read_in_order(self, segment: _Segment, file: DataFile) -> None:
        """Reads chunks of which the box's memory is made: each to where it lies in it."""
        whole, size = bytes_of(self._array), self._leaf.chunk_bytes
        step = segment.chunks if self._files.reads_whole else 1
        for i in range(0, segment.chunks, step):
            begin = (segment.first + i) * size
            piece = whole[begin : begin + step * size]  # the last one may be without its padding
            file.read_into(segment.offset + i * size, piece.data)
            for j in range(step):
                self._check(segment.first + i + j, piece[j * size : (j + 1) * size])

    def _read_apart(self, segment: _Segment, file: DataFile) -> None:
        """Reads chunks whose rows lie apart in the box's memory."""
        leaf, end = self._leaf, segment.first + segment.chunks
        places = islice(chunk_regions(self._size, leaf.chunk), segment.first, end)
        step = segment.chunks if self._files.reads_whole else 1
        chunks = np.empty((step, *leaf.chunk), leaf.numpy_dtype)
        for i, place in enumerate(places):
            if i % step == 0:
                file.read_into(segment.offset + i * leaf.chunk_bytes, bytes_of(chunks).data)
            piece = chunks[i % step][tuple(slice(cut.stop - cut.start) for cut in place)]
            self._check(segment.first + i, bytes_of(piece))
            self._array[place] = piece

    def _check(self, position: int, data: np.ndarray) -> None:
        expected = self._leaf.boxes[0].digests
        number = self._numbers[position]
        if expected and expected[number]:
            require_digest(number, digest(data.data), expected[number])


def _segments(
    leaf: Leaf, numbers: Sequence[int], parts: Sequence[str], *, most_bytes: int
) -> Iterator[_Segment]:
    """Finds where the chunks of a box lie, ascending `numbers`, in pieces fit for a task."""
    most = max(most_bytes // leaf.chunk_bytes, 1)
    ends = list(accumulate(chunks for _, _, chunks in leaf.runs))
    places = ((bisect_right(ends, number), at, number) for at, number in enumerate(numbers))
    for _, in_a_row in groupby(places, lambda place: (place[0], place[2] - place[1])):
        chunks = list(in_a_row)
        for i in range(0, len(chunks), most):
            run, first, number = chunks[i]
            part, offset, size = leaf.runs[run]
            skipped_bytes = (number - (ends[run] - size)) * leaf.chunk_bytes
            count = min(most, len(chunks) - i)
            yield _Segment(data_path(parts[part]), offset + skipped_bytes, first, count)
