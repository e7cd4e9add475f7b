"""Reads chunks straight from the parts' data files, in parallel, and checks every digest.

The table of contents says where they lie (`Leaf.runs`). Each is read into the place that it has in
the array, and nothing else holds the data meanwhile: a device that shares the host's memory takes
the array over as it is, which is why it begins where devices want it.
"""

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import islice
from pathlib import Path

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
from flax_partial.storage import system

_ALIGNED_BYTES = 64  # what JAX's CPU devices ask of memory to take it over
_MAPPED_BYTES = 4 << 20  # from here on NumPy asks for huge pages
_AT_ONCE_BYTES = 16 << 20
_THREADS = min(16, max(4, os.cpu_count() or 1))  # while one waits for a disk, another can copy


def read(
    state: Path, parts: Sequence[str], regions: Iterable[Region]
) -> list[np.ndarray | Exception]:
    """Reads boxes of leaves that have runs.

    Args:
      state: Directory of the parts.
      parts: Their data files, as the leaves' runs number them.
      regions: Each a leaf, the box's start and its shape.

    Returns:
      For each region its data, C-contiguous and the caller's own; a `ValueError` where it is
      damaged, an `OSError` where the system refused to read it.
    """
    readings = [_Reading(state, parts, *region) for region in regions]
    tasks = [task for reading in readings for task in reading.begin()]
    if len(tasks) <= 1 or sum(reading.bytes for reading in readings) < _AT_ONCE_BYTES:
        for task in tasks:
            task()
    else:
        _do_all(tasks)
    return [reading.outcome() for reading in readings]


def _do_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Does tasks on several threads; where it is interrupted, only those that have begun."""
    with ThreadPoolExecutor(min(_THREADS, len(tasks)), "flax_partial-read") as pool:
        try:
            for one in [pool.submit(task) for task in tasks]:
                one.result()
        except RuntimeError:  # the system, or an interpreter that is ending, starts no thread
            for task in tasks:
                task()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns new memory that a CPU device can take over: as an array, nothing written.

    Large arrays are mapped: NumPy would ask for huge pages, and where memory is in pieces, as it
    is next to a full page cache, finding those took twice the time of the whole reading.
    """
    size = math.prod(shape) * dtype.itemsize
    if size >= _MAPPED_BYTES:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapped, np.uint8).view(dtype).reshape(shape)
    memory = np.empty(size + _ALIGNED_BYTES, np.uint8)
    first = -memory.__array_interface__["data"][0] % _ALIGNED_BYTES
    return memory[first : first + size].view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Chunks of a box that follow one another in a data file, and in the box.

    Attributes:
      path: The file.
      offset: Where the first of them begins, in bytes.
      first: Its position among the chunks of the box.
      chunks: How many they are.
    """

    path: Path
    offset: int
    first: int
    chunks: int


class _Reading:
    """One box on its way into memory; the first error of its tasks is its outcome."""

    def __init__(
        self, state: Path, parts: Sequence[str], leaf: Leaf, start: Shape, shape: Shape
    ) -> None:
        self._leaf = leaf
        self._start, self._shape = start, shape
        self._low, self._size = covering_box(start, shape, leaf.chunk, leaf.shape)
        self._numbers = list(chunk_numbers(self._low, self._size, leaf.chunk, leaf.shape))
        self._segments = list(_segments(leaf, self._numbers, state, parts))
        self._array = np.empty(0, leaf.numpy_dtype)
        self._error: Exception | None = None
        self.bytes = math.prod(self._size) * leaf.numpy_dtype.itemsize

    def begin(self) -> list[Callable[[], None]]:
        """Takes memory, and returns what has to be done, in any order and on any thread."""
        try:
            for segment in self._segments:
                _require_there(segment, self._leaf.chunk_bytes)
        except (ValueError, OSError) as error:
            self._error = error
            return []
        self._array = aligned_empty(self._size, self._leaf.numpy_dtype)
        in_order = are_in_order(self._size, self._leaf.chunk)
        read_segment = self._read_in_order if in_order else self._read_apart
        return [partial(self._attempt, read_segment, segment) for segment in self._segments]

    def outcome(self) -> np.ndarray | Exception:
        """What was read, once all is done."""
        if self._error is not None:
            return self._error
        if self._size == self._shape:
            return self._array
        offset = tuple(a - b for a, b in zip(self._start, self._low, strict=True))
        cut = aligned_empty(self._shape, self._array.dtype)
        cut[...] = self._array[slices(offset, self._shape)]
        return cut

    def _attempt(self, read_segment: Callable[[_Segment, FileIO], None], segment: _Segment) -> None:
        if self._error is not None:
            return
        try:
            with segment.path.open("rb", buffering=0) as file:
                read_segment(segment, file)
        except (ValueError, OSError) as error:
            self._error = error

    def _read_in_order(self, segment: _Segment, file: FileIO) -> None:
        """Reads chunks of which the box's memory is made: each to where it lies in it."""
        whole, size = bytes_of(self._array), self._leaf.chunk_bytes
        for i in range(segment.chunks):
            begin = (segment.first + i) * size
            piece = whole[begin : begin + size]  # the last one may be without its padding
            _read_whole(file, piece, segment.offset + i * size)
            self._check(segment.first + i, piece)

    def _read_apart(self, segment: _Segment, file: FileIO) -> None:
        """Reads chunks whose rows lie apart in the box's memory."""
        leaf, end = self._leaf, segment.first + segment.chunks
        places = islice(chunk_regions(self._size, leaf.chunk), segment.first, end)
        for i, place in enumerate(places):
            chunk = np.empty(leaf.chunk, leaf.numpy_dtype)
            _read_whole(file, bytes_of(chunk), segment.offset + i * leaf.chunk_bytes)
            piece = chunk[tuple(slice(cut.stop - cut.start) for cut in place)]
            self._check(segment.first + i, bytes_of(piece))
            self._array[place] = piece

    def _check(self, position: int, data: np.ndarray) -> None:
        expected = self._leaf.boxes[0].digests
        number = self._numbers[position]
        if expected and expected[number]:
            require_digest(number, digest(data.data), expected[number])


def _segments(
    leaf: Leaf, numbers: Sequence[int], state: Path, parts: Sequence[str]
) -> Iterator[_Segment]:
    """Finds where the chunks of a box lie, ascending `numbers`, in pieces fit for a task."""
    most = max(_AT_ONCE_BYTES // leaf.chunk_bytes, 1)
    position = begin = 0
    for part, offset, chunks in leaf.runs:
        end = begin + chunks
        while position < len(numbers) and numbers[position] < end:
            first = position
            while (
                position < len(numbers)
                and numbers[position] == numbers[first] + position - first
                and numbers[position] < end
                and position - first < most
            ):
                position += 1
            at = offset + (numbers[first] - begin) * leaf.chunk_bytes
            yield _Segment(state / data_path(parts[part]), at, first, position - first)
        begin = end


def _require_there(segment: _Segment, chunk_bytes: int) -> None:
    """Compares with the file's size, before memory is taken for what a damaged table claims."""
    try:
        size = segment.path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        size = 0
    end = segment.offset + segment.chunks * chunk_bytes
    if end > size:
        raise ValueError(f"{segment.path} is of {size} bytes, and the data in it goes to {end}")


def _read_whole(file: FileIO, into: np.ndarray, offset: int) -> None:
    view = into.data
    file.seek(offset)
    while view:
        count = file.readinto(view[: system.MOST_BYTES])
        if not count:
            raise ValueError("its data file was cut short")
        view = view[count:]
