"""The one module that speaks tensorstore: write a part, merge parts, read leaves.

Arrays are zarr3 in an OCDBT database, one database a part and one for the finalized checkpoint,
whose values refer to the parts' data files. A part holds chunks only; the zarr metadata of a leaf
is a function of its table entry and is written once, when parts are merged.

Small chunks are written and read as raw key-value pairs, which costs a twentieth of opening a zarr
array; large ones through zarr, which takes no extra memory. Both give the same bytes on disk.
tensorstore's own fsyncs are off: `storage` makes data durable, once, in the order that matters.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from flax_partial.chunks import (
    Shape,
    chunk_numbers,
    chunk_regions,
    covering_box,
    slices,
)
from flax_partial.errors import CorruptCheckpointError
from flax_partial.keypaths import prefix_of
from flax_partial.merge import PartCopy
from flax_partial.orbax_format import zarr_metadata
from flax_partial.part import Box, Leaf, digest

_RAW_CHUNK_BYTES = 128 * 1024  # above this a raw write's extra copies cost more than a zarr open
_INLINE_BYTES = 1024
_DATA_FILE_BYTES = 128 << 20
_OPEN_AT_ONCE = 512

Region = tuple[Leaf, Shape, Shape]
HostBoxes = Sequence[tuple[Leaf, Sequence[np.ndarray]]]


def write_part(directory: Path, boxes: HostBoxes, *, checksum: bool) -> list[Leaf]:
    """Writes boxes of leaves into a part's new database, in one atomic transaction.

    Args:
      directory: The part's directory, absolute.
      boxes: Each array leaf with the data of each of its boxes, in the order of `leaf.boxes`.
      checksum: Whether to take a digest of every chunk.

    Returns:
      The leaves, their boxes with digests.

    Raises:
      OSError: Writing failed; the directory may hold part of the data, and no table of contents.
    """
    if not any(math.prod(box.shape) for leaf, _ in boxes for box in leaf.boxes):
        return [leaf for leaf, _ in boxes]
    context = _context()
    transaction = ts.Transaction(atomic=True)
    try:
        database = ts.KvStore.open(_database(directory, create=True), context=context).result()
        raw = database.with_transaction(transaction)
        copies: list[Any] = []
        for leaf, data in boxes:
            if not data:
                continue
            if _is_raw(leaf):
                _write_raw(raw, leaf, data)
            else:
                copies += _write_zarr(directory, context, transaction, leaf, data)
        written = [_with_digests(leaf, data) if checksum else leaf for leaf, data in boxes]
        for copy in copies:
            copy.result()
        transaction.commit_sync()
    except ValueError as error:
        raise _as_os_error(error, directory) from error
    return written


def _context() -> ts.Context:
    """A fresh one each time: it caches manifests, also those of files that were deleted since."""
    return ts.Context({"file_io_sync": False})


def _database(directory: Path, *, create: bool) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{directory}/"},
    }
    if create:  # naming a configuration when only reading would write one
        spec["config"] = {"max_inline_value_bytes": _INLINE_BYTES, "compression": None}
        spec["target_data_file_size"] = _DATA_FILE_BYTES
    return spec


def _is_raw(leaf: Leaf) -> bool:
    chunk_bytes = math.prod(leaf.chunk) * leaf.numpy_dtype.itemsize
    return chunk_bytes <= _RAW_CHUNK_BYTES and leaf.compression is None


def _write_raw(database: ts.KvStore, leaf: Leaf, data: Sequence[np.ndarray]) -> None:
    for box, array in zip(leaf.boxes, data, strict=True):
        if box.shape == leaf.chunk:
            database.write(next(leaf.keys_of(box)), array.tobytes())
            continue
        regions = chunk_regions(box.shape, leaf.chunk)
        for key, region in zip(leaf.keys_of(box), regions, strict=True):
            database.write(key, _padded(array[region], leaf.chunk).tobytes())


def _padded(array: np.ndarray, shape: Shape) -> np.ndarray:
    """zarr stores the chunks at an array's end whole."""
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded


def _write_zarr(
    directory: Path,
    context: ts.Context,
    transaction: ts.Transaction,
    leaf: Leaf,
    data: Sequence[np.ndarray],
) -> list[Any]:
    spec = {
        "driver": "zarr3",
        "metadata": json.loads(zarr_metadata(leaf)),
        "kvstore": _database(directory, create=True) | {"path": leaf.prefix},
        "store_data_equal_to_fill_value": True,  # a chunk that is not there is a lost one
    }
    store = ts.open(
        spec, open=True, assume_metadata=True, context=context, transaction=transaction
    ).result()
    writes = []
    for box, array in zip(leaf.boxes, data, strict=True):
        # The transaction keeps references to the data, not copies: nobody changes a snapshot.
        region = store[slices(box.start, box.shape)]
        writes.append(region.write(array, can_reference_source_data_indefinitely=True).copy)
    return writes


def _with_digests(leaf: Leaf, data: Sequence[np.ndarray]) -> Leaf:
    boxes = [
        Box(box.start, box.shape, tuple(digests_of(array, leaf.chunk)))
        for box, array in zip(leaf.boxes, data, strict=True)
    ]
    return leaf.with_boxes(tuple(boxes))


def digests_of(array: np.ndarray, chunk: Shape) -> Iterator[str]:
    """Yields the digest of each chunk of a box's data, in C order."""
    if array.shape == chunk:
        yield digest(_bytes_view(array))
        return
    for region in chunk_regions(array.shape, chunk):
        yield digest(_bytes_view(array[region]))


def _bytes_view(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def merge_parts(state: Path, copies: Sequence[PartCopy], leaves: Sequence[Leaf]) -> None:
    """Makes the root database: references to the parts' chunks, and each leaf's zarr metadata.

    Args:
      state: Directory of the parts, absolute; it holds no root database.
      copies: What to take from which part.
      leaves: The merged leaves.

    Raises:
      CorruptCheckpointError: A part's database cannot be read.
      OSError: Writing failed.
    """
    context = _context()
    root = ts.KvStore.open(_database(state, create=True), context=context).result()
    transaction = ts.Transaction(atomic=True)
    target = root.with_transaction(transaction)
    try:
        for first in range(0, len(copies), _OPEN_AT_ONCE):
            _copy_parts(state, copies[first : first + _OPEN_AT_ONCE], target, context)
        for leaf in leaves:
            if leaf.is_array:
                target.write(leaf.prefix + "zarr.json", zarr_metadata(leaf))
        transaction.commit_sync()
    except ValueError as error:
        raise _as_os_error(error, state) from error


def _copy_parts(
    state: Path, copies: Sequence[PartCopy], target: ts.KvStore, context: ts.Context
) -> None:
    opened = [
        ts.KvStore.open(_database(state / copy.part, create=False), context=context)
        for copy in copies
    ]
    copying = []
    for copy, future in zip(copies, opened, strict=True):
        database = future.result()
        ranges = [None] if copy.ranges is None else [ts.KvStore.KeyRange(*r) for r in copy.ranges]
        for source_range in ranges:
            done = database.experimental_copy_range_to(target, source_range=source_range)
            copying.append((copy.part, done))
    for part, done in copying:
        try:
            done.result()
        except ValueError as error:
            raise CorruptCheckpointError(f"{state / part}: cannot be read: {error}") from error


def read_regions(state: Path, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
    """Reads boxes of leaves from a finalized checkpoint, all at once, and checks every digest.

    Args:
      state: Directory of the root database, absolute.
      regions: Each a leaf, the box's start and its shape.

    Returns:
      For each region its data, C-contiguous and the caller's own, or a `CorruptCheckpointError`
      that names the leaf.
    """
    reader = _Reader(state)
    started = [reader.start(*region) for region in regions]
    return [_outcome(finish, leaf) for finish, (leaf, _, _) in zip(started, regions, strict=True)]


class _Reader:
    """Reads from one root database; each method starts to read, and returns what waits for it."""

    def __init__(self, state: Path) -> None:
        self._context = _context()
        self._spec = _database(state, create=False)
        self._database = ts.KvStore.open(self._spec, context=self._context).result()

    def start(self, leaf: Leaf, start: Shape, shape: Shape) -> Callable[[], np.ndarray]:
        """Reads the chunks that hold a box, checks them, and cuts the box out of them."""
        if not math.prod(shape):
            return lambda: np.empty(shape, leaf.numpy_dtype)
        if leaf.is_one_chunk:
            low, size = (0,) * len(shape), leaf.shape
        else:
            low, size = covering_box(start, shape, leaf.chunk, leaf.shape)
        read = (self._raw if _is_raw(leaf) else self._zarr)(leaf, low, size)

        def finish() -> np.ndarray:
            array = read()
            _check(leaf, low, array)
            if size == shape:
                return array
            offset = tuple(a - b for a, b in zip(start, low, strict=True))
            return array[slices(offset, shape)].copy()

        return finish

    def _raw(self, leaf: Leaf, start: Shape, shape: Shape) -> Callable[[], np.ndarray]:
        keys = leaf.keys_of(Box(start, shape))
        reads = [(key, self._database.read(key)) for key in keys]

        def finish() -> np.ndarray:
            chunks = [_chunk(key, read.result(), leaf) for key, read in reads]
            if leaf.is_one_chunk:
                return chunks[0].copy()  # what was read cannot be written to
            array = np.empty(shape, leaf.numpy_dtype)
            for chunk, region in zip(chunks, chunk_regions(shape, leaf.chunk), strict=True):
                array[region] = chunk[tuple(slice(r.stop - r.start) for r in region)]
            return array

        return finish

    def _zarr(self, leaf: Leaf, start: Shape, shape: Shape) -> Callable[[], np.ndarray]:
        store = ts.open(
            {
                "driver": "zarr3",
                "metadata": json.loads(zarr_metadata(leaf)),
                "kvstore": self._spec | {"path": leaf.prefix},
                "fill_missing_data_reads": False,  # else a lost chunk reads as zeros
            },
            open=True,
            assume_metadata=True,
            context=self._context,
        ).result()
        reading = store[slices(start, shape)].read()
        return lambda: np.asarray(reading.result(), order="C")


def _chunk(key: str, result: ts.KvStore.ReadResult, leaf: Leaf) -> np.ndarray:
    if result.state != "value":
        raise ValueError(f"chunk {key!r} is missing")
    return np.frombuffer(result.value, leaf.numpy_dtype).reshape(leaf.chunk)


def _check(leaf: Leaf, start: Shape, array: np.ndarray) -> None:
    """Compares the digests of the chunks that `array`, a union of whole chunks, is made of."""
    expected = leaf.boxes[0].digests
    if not expected:
        return
    if leaf.is_one_chunk:
        numbers = iter((0,))
    else:
        numbers = chunk_numbers(start, array.shape, leaf.chunk, leaf.shape)
    for number, found in zip(numbers, digests_of(array, leaf.chunk), strict=True):
        if expected[number] not in ("", found):
            raise ValueError(f"chunk {number} has digest {found}, and {expected[number]} was saved")


def _outcome(finish: Callable[[], np.ndarray], leaf: Leaf) -> np.ndarray | Exception:
    try:
        return finish()
    except ValueError as error:
        return CorruptCheckpointError(f"Leaf {leaf.name!r}: {error}")


Store = ts.TensorStore


def open_stores(
    directory: Path, names: Sequence[str], *, driver: str, in_database: bool, fill_missing: bool
) -> list[Store | Exception]:
    """Opens arrays as another program laid them out, all at once.

    Args:
      directory: Where they are, absolute.
      names: Their names.
      driver: `zarr` or `zarr3`.
      in_database: Whether the directory is an OCDBT database, not plain files.
      fill_missing: Whether a chunk that is not there means zeros; an error when reading otherwise.

    Returns:
      For each name the open array, or what tensorstore says.
    """
    context = _context()
    base: dict[str, Any] = _database(directory, create=False) if in_database else {"driver": "file"}
    root = "" if in_database else f"{directory}/"
    opening = [
        ts.open(
            {
                "driver": driver,
                "kvstore": base | {"path": root + prefix_of(name)},
                "fill_missing_data_reads": fill_missing,
            },
            open=True,
            read=True,
            context=context,
        )
        for name in names
    ]
    return [_result(future) for future in opening]


def describe_store(store: Store) -> tuple[str, Shape, Shape]:
    """Returns dtype, shape and the shape of what is read at once."""
    chunk = store.chunk_layout.read_chunk.shape or (1,) * store.rank
    return store.dtype.name, store.shape, tuple(max(size or 1, 1) for size in chunk)


def read_stores(regions: Sequence[tuple[Store, Shape, Shape]]) -> list[np.ndarray | Exception]:
    """Reads boxes of open arrays, all at once: each an array, the box's start and its shape.

    Returns:
      For each box its data, C-contiguous and the caller's own, or what tensorstore says.
    """
    started = [
        _too_large(store, shape) or store[slices(start, shape)].read()
        for store, start, shape in regions
    ]
    outcomes = [one if isinstance(one, Exception) else _result(one) for one in started]
    return [
        outcome if isinstance(outcome, Exception) else np.asarray(outcome, order="C")
        for outcome in outcomes
    ]


def _too_large(store: Store, shape: Shape) -> Exception | None:
    """Says why there is no memory for a box, or for one chunk of its array.

    A damaged shape can be of any size, and tensorstore ends the process where NumPy raises.
    """
    try:
        for wanted in (shape, describe_store(store)[2]):
            np.empty(wanted, store.dtype.numpy_dtype)
    except (ValueError, MemoryError) as error:
        return error
    return None


def _result(future: ts.Future[Any]) -> Any:
    try:
        return future.result()
    except ValueError as error:
        return error


def read_zarr_metadata(state: Path, leaves: Sequence[Leaf]) -> dict[str, str]:
    """Compares the zarr metadata in a root database with what the leaves ask for.

    Returns:
      Name of each leaf whose metadata is not the expected, to what is wrong.
    """
    database = ts.KvStore.open(_database(state, create=False), context=_context()).result()
    reads = [(leaf, database.read(leaf.prefix + "zarr.json")) for leaf in leaves if leaf.is_array]
    problems = {}
    for leaf, read in reads:
        try:
            found = read.result().value
        except ValueError as error:
            problems[leaf.name] = f"its zarr metadata cannot be read: {error}"
            continue
        if found != zarr_metadata(leaf):
            problems[leaf.name] = "its zarr metadata is missing, or not what the parts add up to"
    return problems


def _as_os_error(error: ValueError, directory: Path) -> OSError:
    """tensorstore reports what the operating system refused as ValueError, with its words."""
    text = str(error)
    code = next((code for code, words in _OS_ERRORS.items() if words in text), errno.EIO)
    return OSError(code, f"{os.strerror(code)} ({text})", str(directory))


_REFUSALS = ("ENOSPC", "EDQUOT", "EACCES", "EROFS", "ENOENT", "EMFILE")
_OS_ERRORS = {code: os.strerror(code) for code in (getattr(errno, name) for name in _REFUSALS)}
