"""The one module that speaks tensorstore: reads arrays, and compresses their chunks.

Arrays are zarr3 in an OCDBT database, whose values refer to the parts' data files. Small chunks are
read as raw key-value pairs, which costs a twentieth of opening a zarr array; large ones through
zarr, which reads them in parallel.
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tensorstore as ts
from msgspec.structs import replace

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.assembly import assemble, checked_cut, whole_chunks
from flax_partial.format.chunks import Shape, chunk_keys, chunk_regions, slices
from flax_partial.format.keypaths import prefix_of
from flax_partial.format.model import Box, Leaf, Region
from flax_partial.format.orbax import zarr_metadata

_RAW_CHUNK_BYTES = 128 * 1024  # above this a raw read's extra copy costs more than a zarr open
_ENCODING_BYTES = 64 << 20


def encoded_chunks(boxes: Iterable[tuple[Leaf, np.ndarray]]) -> Iterator[bytes]:
    """Yields the chunks of boxes as the codecs of their leaves store them.

    As many are encoded at a time as there are cores, of one box or of several, and about 64 MiB at
    most are held beside the boxes.

    Args:
      boxes: Each a leaf, and the data of a box of it.

    Yields:
      The chunks of one box after another, those of a box in C order.
    """
    context = _context()
    memory = ts.KvStore.open("memory://", context=context).result()
    encoding: deque[tuple[ts.WriteFutures, str, int]] = deque()
    held_bytes = 0

    def take() -> bytes:
        nonlocal held_bytes
        writing, key, size = encoding.popleft()
        writing.result()
        encoded: bytes = memory.read(key).result().value
        memory.write(key, None).result()
        held_bytes -= size
        return encoded

    for number, (leaf, array) in enumerate(boxes):
        prefix = f"{number}/"
        store = _memory_store(leaf, array.shape, prefix, context)
        keys = chunk_keys(prefix, (0,) * array.ndim, array.shape, leaf.chunk)
        for key, region in zip(keys, chunk_regions(array.shape, leaf.chunk), strict=True):
            while encoding and held_bytes + leaf.chunk_bytes > _ENCODING_BYTES:
                yield take()
            chunk = array[region]
            writing = store[region].write(chunk, can_reference_source_data_indefinitely=True)
            encoding.append((writing, key, leaf.chunk_bytes))
            held_bytes += leaf.chunk_bytes
    while encoding:
        yield take()


def _memory_store(leaf: Leaf, shape: Shape, prefix: str, context: ts.Context) -> "Store":
    """Opens an array in memory with the codecs of a leaf; its keys begin with `prefix`."""
    spec = {
        "driver": "zarr3",
        "metadata": json.loads(zarr_metadata(replace(leaf, shape=shape, boxes=()))),
        "kvstore": {"driver": "memory", "path": prefix},
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, open=True, assume_metadata=True, context=context).result()


def _context() -> ts.Context:
    """A fresh one each time: it caches manifests, also those of files that were deleted since."""
    return ts.Context()


def _database(directory: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}


def _is_raw(leaf: Leaf) -> bool:
    return leaf.chunk_bytes <= _RAW_CHUNK_BYTES and leaf.compression is None


def read_regions(state: Path, regions: Sequence[Region]) -> list[np.ndarray | Exception]:
    """Reads boxes of leaves from a finalized checkpoint, all at once, and checks every digest.

    Args:
      state: Directory of the root database, absolute.
      regions: Each a leaf, the box's start and its shape.

    Returns:
      For each region its data, C-contiguous and the caller's own, or a `CorruptCheckpointError`
      that names the leaf; an `OSError` where the system refused to read, which does not tell of
      the data.
    """
    return _read(_Reader(_database(state), _context()), regions, state)


def read_chunks(
    chunks: Mapping[str, bytes], regions: Sequence[Region]
) -> list[np.ndarray | Exception]:
    """Does what `read_regions` does, of chunks that are in memory as they are stored.

    Args:
      chunks: Chunks by their keys in the database; one that is not there is missing.
      regions: Each a leaf, the box's start and its shape.
    """
    context, spec = _context(), {"driver": "memory"}
    memory = ts.KvStore.open(spec, context=context).result()
    for writing in [memory.write(key, chunk) for key, chunk in chunks.items()]:
        writing.result()
    return _read(_Reader(spec, context), regions, Path())


def _read(
    reader: "_Reader", regions: Sequence[Region], state: Path
) -> list[np.ndarray | Exception]:
    started = [_started(reader, region) for region in regions]
    return [
        _outcome(finish, leaf, state) for finish, (leaf, _, _) in zip(started, regions, strict=True)
    ]


def _started(reader: "_Reader", region: Region) -> Callable[[], np.ndarray]:
    """Starts to read; what already fails then does so when it is waited for."""
    try:
        return reader.start(*region)
    except ValueError as error:
        return partial(_raise, error)


def _raise(error: Exception) -> NoReturn:
    raise error


class _Reader:
    """Reads chunks by their keys; each method starts to read, and returns what waits for it."""

    def __init__(self, spec: dict[str, Any], context: ts.Context) -> None:
        """Opens the database, or what else holds the chunks by their keys."""
        self._context = context
        self._spec = spec
        self._database = ts.KvStore.open(self._spec, context=self._context).result()

    def start(self, leaf: Leaf, start: Shape, shape: Shape) -> Callable[[], np.ndarray]:
        """Reads the chunks that hold a box, checks them, and cuts the box out of them."""
        if not math.prod(shape):
            return lambda: np.empty(shape, leaf.numpy_dtype)
        box = whole_chunks(leaf, start, shape)
        read = (self._raw if _is_raw(leaf) else self._zarr)(leaf, box)
        return lambda: checked_cut(leaf, box, read(), start=start, shape=shape)

    def _raw(self, leaf: Leaf, box: Box) -> Callable[[], np.ndarray]:
        reads = [(key, self._database.read(key)) for key in leaf.keys_of(box)]
        return lambda: assemble(
            leaf, box.shape, [_value(key, read.result()) for key, read in reads]
        )

    def _zarr(self, leaf: Leaf, box: Box) -> Callable[[], np.ndarray]:
        np.empty(box.shape, leaf.numpy_dtype)  # raises where tensorstore would end the process
        if leaf.compression == "blosc":
            self._require_sizes(leaf, box)
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
        reading = store[slices(box.start, box.shape)].read()
        return lambda: np.asarray(reading.result(), order="C")

    def _require_sizes(self, leaf: Leaf, box: Box) -> None:
        """Refuses blosc chunks of any other size: tensorstore takes the memory that they claim.

        Bytes 4 to 8 of a blosc buffer are its size when decoded (c-blosc, README_CHUNK_FORMAT).
        """
        sizes = slice(4, 8)
        reads = [(key, self._database.read(key, byte_range=sizes)) for key in leaf.keys_of(box)]
        for key, read in reads:
            size = int.from_bytes(_value(key, read.result()), "little")
            if size != leaf.chunk_bytes:
                raise ValueError(f"chunk {key!r} decodes to {size} bytes, not {leaf.chunk_bytes}")


def _value(key: str, result: ts.KvStore.ReadResult) -> bytes:
    if result.state != "value":
        raise ValueError(f"chunk {key!r} is missing")
    value: bytes = result.value
    return value


def _outcome(finish: Callable[[], np.ndarray], leaf: Leaf, state: Path) -> np.ndarray | Exception:
    try:
        return finish()
    except ValueError as error:
        return _refusal(error, state) or CorruptCheckpointError(f"Leaf {leaf.name!r}: {error}")


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
      For each name the open array, or tensorstore's error.
    """
    context = _context()
    base: dict[str, Any] = _database(directory) if in_database else {"driver": "file"}
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
      For each box its data, C-contiguous and the caller's own, or tensorstore's error.
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
    """Returns why there is no memory for a box, or for one chunk of its array.

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


def _refusal(error: ValueError, directory: Path) -> OSError | None:
    """Returns the operating system's error, if it refused to read: the data may be as it was."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found is None:
        return None
    code = int(found[1])
    return OSError(code, f"{os.strerror(code)} ({error})", str(directory))
