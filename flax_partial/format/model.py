"""What a part and a checkpoint hold, as values: leaves, their boxes, and where the chunks lie.

Boxes, leaves and their paths are never changed once they are made. They are `msgspec` structs
without cycles, which Python's cycle collector does not have to look at: a checkpoint may have a
hundred thousand of each.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, get_args

import ml_dtypes
import numpy as np
from msgspec import Meta, Struct, structs

from flax_partial.format.chunks import Shape, chunk_keys
from flax_partial.format.keypaths import KeyPath, prefix_of
from flax_partial.options import Compression

DATA_FILE = "data"  # of a part: the chunks that its table does not hold itself
INLINE_BYTES = 1024  # a chunk of at most so many bytes stands in the table
MOST_AXES = 32  # of what tensorstore, and so Orbax, can open
MOST_BYTES = 2**62  # of a leaf; beyond it even zarr's arithmetic ends
_DIRECTORY_PROCESSES = 1000  # whose parts share a directory, where there are more processes

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""What can be counted: bytes, indices, nanoseconds."""

Process = Annotated[int, Meta(ge=0, le=2**32)]
"""Index of a process."""

Run = tuple[Count, Count, Count]
"""Chunks that follow one another in a data file: number of the file, offset, number of chunks."""

Place = bytes | tuple[Count, Count]
"""Where a chunk is: the bytes themselves, or their offset and length in the leaf's data file."""

Kind = Literal[
    "jax.Array",
    "np.ndarray",
    "np.generic",
    "scalar",
    "string",
    "bytes",
    "None",
    "prng_key",
    "dict",
    "list",
    "tuple",
    "namedtuple",
]
JAX_ARRAY: Final = "jax.Array"
NUMPY_ARRAY: Final = "np.ndarray"
NUMPY_SCALAR: Final = "np.generic"
SCALAR: Final = "scalar"
STRING: Final = "string"
BYTES: Final = "bytes"
NONE: Final = "None"
PRNG_KEY: Final = "prng_key"
DICT: Final = "dict"
LIST: Final = "list"
TUPLE: Final = "tuple"
NAMED_TUPLE: Final = "namedtuple"
ARRAY_KINDS: frozenset[str] = frozenset((JAX_ARRAY, NUMPY_ARRAY, NUMPY_SCALAR, SCALAR, PRNG_KEY))
EMPTY_CONTAINERS: frozenset[str] = frozenset((DICT, LIST, TUPLE, NAMED_TUPLE))

# dtypes that zarr3 stores, by NumPy's names (tensorstore 0.1.86; raw bytes and zarr's encoding of
# each were compared and are the same).
Dtype = Literal[
    "bool",
    "int2",
    "int4",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "bfloat16",
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
STORABLE_DTYPES = frozenset(get_args(Dtype))


class Box(Struct, gc=False, array_like=True):
    """A range of indices of a leaf, and of each of its chunks the digest and the place.

    Attributes:
      start: First index along each axis; a multiple of the chunk's length.
      shape: Number of indices along each axis.
      digests: xxh3-128 of each chunk's bytes as read (little-endian, C order, without padding), in
        hexadecimal, in C order of the chunks; empty where none were taken. A single digest is `""`
        where only that chunk has none.
      places: Where each chunk is, as stored, in the same order; in a checkpoint's contents only
        where all of the leaf's chunks are the bytes themselves.
    """

    start: tuple[Count, ...]
    shape: tuple[Count, ...]
    digests: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()


class Sharding:  # noqa: PLW1641 - it is never hashed
    """A sharding in Orbax's terms; leaves share the object, and a table lists it once."""

    __slots__ = ("json",)

    def __init__(self, json: dict[str, Any]) -> None:
        """Takes what JSON holds of it; it is not changed any more."""
        self.json = json

    def __eq__(self, other: object) -> bool:
        """Whether two shardings are the same in Orbax's terms."""
        return isinstance(other, Sharding) and self.json == other.json


class Leaf(KeyPath, gc=False, omit_defaults=True):
    """A leaf of a tree, or the boxes of it that one part holds; as it stands in tables.

    Attributes:
      texts: As in `KeyPath`; so are `key_kinds` and `name`.
      kind: What it is, one of the kinds named at the top of this module.
      generation: How often the leaf had been replaced when this was saved.
      text: Value of a string; for a PRNG key, the name of its implementation.
      data: Value of a bytes leaf.
      placeholder: Whether it is an empty container where other parts may hold something: it gives
        way to a leaf of its name, and to leaves inside of it.
      dtype: NumPy name of the stored elements' dtype; empty for what has no data.
      shape: Global shape of the stored array (of a PRNG key: of its key data).
      chunk: Shape of a chunk of the stored array.
      boxes: Those of its boxes that are there.
      runs: In a checkpoint's contents, where its chunks are, in C order; empty where some stand in
        the database or are compressed.
      file: In a part, which of its data files holds them: 0 for the one written with it, `data`; n
        for `data.n`, which an earlier part shares with it.
      compression: `zstd`, `blosc`, or None.
      sharding: Its sharding; in a table the number that this has there.
      writers: In the part of one of several processes that save a leaf together, which of them
        write some of it, as ranges: the first, and the one after the last; empty in other parts.
    """

    kind: Kind
    generation: Count = 0
    text: str = ""
    data: bytes = b""
    placeholder: bool = False
    dtype: Dtype | Literal[""] = ""
    shape: tuple[Count, ...] = ()
    chunk: tuple[Count, ...] = ()
    boxes: tuple[Box, ...] = ()
    runs: tuple[Run, ...] = ()
    file: Count = 0
    compression: Compression | None = None
    sharding: Sharding | None = None
    writers: tuple[tuple[Process, Process], ...] = ()

    @property
    def is_array(self) -> bool:
        """Whether it has data in the database."""
        return self.kind in ARRAY_KINDS

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored elements."""
        return numpy_dtype(self.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk in memory, in bytes."""
        return size_of(self.dtype, self.chunk)

    @property
    def bytes(self) -> int:
        """Size of the whole leaf's data in memory, in bytes."""
        return size_of(self.dtype, self.shape)

    @property
    def prefix(self) -> str:
        """What the keys of its chunks, and of its zarr metadata, begin with."""
        return prefix_of(self.name)

    @property
    def summary(self) -> str:
        """What it is, for an error message."""
        if not self.is_array:
            return f"{self.kind} {self.text!r}" if self.text else self.kind
        return f"{self.kind} {self.dtype}{list(self.shape)} in chunks of {list(self.chunk)}"

    def with_boxes(
        self, boxes: tuple[Box, ...], runs: tuple[Run, ...] = (), file: int = 0
    ) -> "Leaf":
        """The same leaf with other boxes, which lie elsewhere."""
        return structs.replace(self, boxes=boxes, runs=runs, file=file)

    @property
    def is_one_chunk(self) -> bool:
        """Whether a single chunk holds the whole array."""
        return self.shape == self.chunk and 0 not in self.shape

    def keys_of(self, box: Box) -> Iterator[str]:
        """Yields the database key of each chunk of a box, in C order."""
        if self.is_one_chunk:
            return iter((f"{self.prefix}c" + "/0" * len(self.shape),))
        return chunk_keys(self.prefix, box.start, box.shape, self.chunk)


Region = tuple[Leaf, Shape, Shape]
"""A box of a leaf to be read: the leaf, the box's start and its shape."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one save by one process committed.

    Attributes:
      process: Index of the process.
      time_ns: When the save began, in nanoseconds since the epoch.
      custom_metadata: What was passed with it.
      leaves: What it holds.
      bytes: Array data in it, in bytes.
      durable: Whether its data files were on the disk when it was committed.
      training: What a training loop recorded of itself with it.
    """

    process: int
    time_ns: int
    custom_metadata: dict[str, Any]
    leaves: tuple[Leaf, ...]
    bytes: int
    durable: bool = False
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a finalized checkpoint holds: every leaf whole, as one box.

    Attributes:
      started_ns: When its first part was saved, in nanoseconds since the epoch.
      committed_ns: When it was finalized, in nanoseconds since the epoch.
      parts: Number of parts it was merged from.
      custom_metadata: That of all parts, merged.
      leaves: Its leaves, in the order in which they were saved.
      data_parts: The data files that the leaves' runs number, each called as by `data_part`.
      first_part: Name of the first of its parts, which no other checkpoint has; empty where Orbax
        wrote it.
      has_inline: Whether the chunks that stand in the parts' tables stand in this one, too, as
        version 2 of the format did not have it.
      training: What a training loop recorded of itself, of all parts, merged.
    """

    started_ns: int
    committed_ns: int
    parts: int
    custom_metadata: dict[str, Any]
    leaves: tuple[Leaf, ...]
    data_parts: tuple[str, ...] = ()
    first_part: str = ""
    has_inline: bool = True
    training: dict[str, Any] = field(default_factory=dict)


def data_file_bytes(leaves: Iterable[Leaf]) -> dict[int, int]:
    """How large each data file of a part with these leaves is at least, by its number."""
    sizes: dict[int, int] = {}
    for leaf in leaves:
        for box in leaf.boxes:
            for place in box.places:
                if isinstance(place, tuple):
                    sizes[leaf.file] = max(sizes.get(leaf.file, 0), sum(place))
    return sizes


def data_part(part: str, file: int) -> str:
    """What a data file is called among all of a checkpoint: by its part, and its number if any."""
    return f"{part}/{DATA_FILE}.{file}" if file else part


def data_path(name: str) -> str:
    """Path below `state/` of the data file that `data_part` calls so."""
    is_file = name.rpartition("/")[2].startswith(f"{DATA_FILE}.")
    return name if is_file else f"{name}/{DATA_FILE}"


def part_path(directory: str, *, process: int, processes: int) -> str:
    """Path below `state/` of a part: its name everywhere.

    Where many processes save, no directory gets the entries of all of them.

    Args:
      directory: Name of the part's own directory.
      process: Index of the process that saves it.
      processes: How many there are.
    """
    if processes <= _DIRECTORY_PROCESSES:
        return directory
    return f"p{process // _DIRECTORY_PROCESSES}/{directory}"


@lru_cache(maxsize=4096)  # most leaves have one of a few shapes
def size_of(dtype: str, shape: Shape) -> int:
    """Size of an array in memory, in bytes; 0 where there is no dtype."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize if dtype else 0


@lru_cache(maxsize=len(STORABLE_DTYPES))
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype called `name`, one of `STORABLE_DTYPES`."""
    return np.dtype(getattr(ml_dtypes, name, name))
