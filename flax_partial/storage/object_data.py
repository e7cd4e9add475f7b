"""The data of parts in an object store: written from where the arrays are, and read back."""

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np

from flax_partial.format.assembly import whole_chunks
from flax_partial.format.chunks import chunk_numbers
from flax_partial.format.merge import Source
from flax_partial.format.model import Place, Region, data_part, data_path
from flax_partial.storage import tensorstore_io
from flax_partial.storage.paths import STATE
from flax_partial.storage.store import MOST_REQUESTS, Store

T = TypeVar("T")

_READ_BYTES = 8 << 20
_DECODED_AT_ONCE_BYTES = 256 << 20


class StorePart:
    """A part that is being written into an object store; see `NewPart`."""

    def __init__(self, store: Store, name: str, commit: Callable[[bytes], None]) -> None:
        """Takes where to put it, its name, and what puts its table."""
        self._store, self._name, self._commit = store, name, commit

    def most_files(self, *, durable: bool) -> int:  # noqa: ARG002
        """One upload is sent in many pieces at a time."""
        return 1

    def link(self, source: Path, file: int, *, size: int, sync: bool) -> bool:  # noqa: ARG002
        """No object gets a second name."""
        return False

    def copy(self, source: BinaryIO, file: int) -> None:
        """Puts what an open file holds."""
        with (
            mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            self._store.put(self._key(file), [view])

    def new_file(
        self,
        file: int,
        *,
        expected_bytes: int,  # noqa: ARG002
        durable: bool,  # noqa: ARG002
        check: Callable[[], None],
    ) -> "StoreSink":
        """Begins a data file."""
        return StoreSink(self._store, self._key(file), check)

    def commit(self, table: bytes, *, has_data_file: bool, durable: bool) -> None:  # noqa: ARG002
        """Puts the table, and waits until it is certain that the part counts."""
        self._commit(table)

    def _key(self, file: int) -> str:
        return f"{STATE}/{data_path(data_part(self._name, file))}"


class StoreSink:
    """A data file of which the pieces are kept, and put when it is finished; copies nothing."""

    def __init__(self, store: Store, key: str, check: Callable[[], None]) -> None:
        self._store, self._key, self._check = store, key, check
        self._pieces: list[memoryview] = []
        self._size = 0

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the pieces."""
        self._pieces = []

    def append(self, data: np.ndarray) -> int:
        """Keeps a view of the bytes; returns their offset."""
        offset = self._size
        self._pieces.append(data.data)
        self._size += data.size
        return offset

    def finish(self) -> None:
        """Puts all of it."""
        self._store.put(self._key, self._pieces, check=self._check)


@dataclass(frozen=True, slots=True)
class StoreDataFiles:
    """The data files of parts in a store; see `DataFiles`.

    Attributes:
      store: The store of the checkpoint.
    """

    store: Store
    most_readers = MOST_REQUESTS
    most_bytes = _READ_BYTES
    least_bytes = 0
    reads_whole = True

    def require(self, path: str, size: int) -> None:
        """Reading reports it: the size of each file would cost a request."""

    def open(self, path: str) -> AbstractContextManager["StoreDataFile"]:
        """Opens nothing."""
        return nullcontext(StoreDataFile(self.store, f"{STATE}/{path}"))


@dataclass(frozen=True, slots=True)
class StoreDataFile:
    """A data file in a store."""

    store: Store
    key: str

    def read_into(self, offset: int, into: memoryview) -> None:
        """Reads bytes of the object."""
        try:
            self.store.get_into(self.key, offset, into)
        except FileNotFoundError:
            raise ValueError("its data file is missing") from None


Sources = Mapping[str, Sequence[Source]]
"""Where the chunks of leaves lie, by the leaves' names."""


def read_stored(
    store: Store, sources: Sources, regions: Sequence[Region]
) -> list[np.ndarray | Exception]:
    """Reads boxes of leaves whose chunks are compressed, and checks every digest.

    Args:
      store: The store of the checkpoint.
      sources: Where the chunks lie.
      regions: Each a leaf, the box's start and its shape.

    Returns:
      For each region its data, C-contiguous and the caller's own, or what is wrong.
    """
    found: list[np.ndarray | Exception] = []
    group: list[Region] = []
    size = 0
    for number, region in enumerate(regions, start=1):
        group.append(region)
        size += np.prod(region[2], dtype=int) * region[0].numpy_dtype.itemsize
        if size >= _DECODED_AT_ONCE_BYTES or number == len(regions):
            found += _read_group(store, sources, group)
            group, size = [], 0
    return found


def _read_group(
    store: Store, sources: Sources, regions: Sequence[Region]
) -> list[np.ndarray | Exception]:
    chunks: dict[str, bytes] = {}
    wanted: dict[str, list[tuple[int, int, str]]] = {}  # offset, length, key; by the data file
    for region in regions:
        for key, part, place in _places(region, sources):
            if isinstance(place, bytes):
                chunks[key] = place
            else:
                wanted.setdefault(part, []).append((*place, key))
    reads = [
        partial(_read_run, store, f"{STATE}/{data_path(part)}", run)
        for part, places in wanted.items()
        for run in _runs(sorted(set(places)))
    ]
    for read in do_all(reads):
        chunks |= read
    return tensorstore_io.read_chunks(chunks, regions)


def _places(region: Region, sources: Sources) -> Iterator[tuple[str, str, Place]]:
    """Yields key, data file and place of each chunk that holds some of a box."""
    leaf, start, shape = region
    if 0 in shape:
        return
    box = whole_chunks(leaf, start, shape)
    all_places = [(part, place) for part, held in sources.get(leaf.name, ()) for place in held]
    numbers = chunk_numbers(box.start, box.shape, leaf.chunk, leaf.shape)
    for key, number in zip(leaf.keys_of(box), numbers, strict=False):
        if number < len(all_places):  # of what is missing, reading says so
            yield key, *all_places[number]


def _runs(places: Sequence[tuple[int, int, str]]) -> Iterator[list[tuple[int, int, str]]]:
    """Joins chunks that follow one another in a file to what is read at once."""
    run: list[tuple[int, int, str]] = []
    for place in places:
        follows = run and place[0] == run[-1][0] + run[-1][1]
        if run and not (follows and place[0] + place[1] - run[0][0] <= _READ_BYTES):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _read_run(store: Store, key: str, run: Sequence[tuple[int, int, str]]) -> dict[str, bytes]:
    """Reads chunks that follow one another; gives none where the file ends before."""
    first = run[0][0]
    data = bytearray(run[-1][0] + run[-1][1] - first)
    try:
        store.get_into(key, first, memoryview(data))
    except (FileNotFoundError, ValueError):
        return {}
    return {name: bytes(data[at - first : at - first + size]) for at, size, name in run}


def do_all(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Does tasks side by side; raises the first error, and begins no more then."""
    if len(tasks) <= 1:
        return [task() for task in tasks]
    pool = ThreadPoolExecutor(min(MOST_REQUESTS, len(tasks)), "store-requests")
    try:
        return [one.result() for one in [pool.submit(task) for task in tasks]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def together(one: Callable[[], T], other: Callable[[], Any]) -> tuple[T, Any]:
    """Does two requests side by side."""
    first, second = do_all([one, other])
    return first, second
