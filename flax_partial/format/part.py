"""Tables of contents: what one part holds (`part.json`), what a checkpoint holds (`contents.json`).

Both are JSON, `{"xxh3_128":"<32 hex digits>","table":{...}}`, the digest being that of the table's
bytes. A whole, valid `part.json` is the commit of its part: what `decode_part` accepts was saved.
Decoding trusts nothing: it checks the digest, every type and size, and that boxes, chunks and
digests agree. Each chunk has its entry, with a digest or not, so that no table can claim more
chunks than it is long: what works on chunks takes memory and time as the table does.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import xxhash

from flax_partial.errors import CorruptCheckpointError, UnsupportedLeafError
from flax_partial.format.chunks import Shape, chunk_counts, chunk_keys, chunk_regions
from flax_partial.format.keypaths import INDEX, KEY_KINDS, TEXT_KEYS, KeyPath, prefix_of
from flax_partial.options import COMPRESSIONS

T = TypeVar("T")

FORMAT_VERSION = 2
DATA_FILE = "data"  # of a part: the chunks that its table does not hold itself
INLINE_BYTES = 1024  # a chunk of at most so many bytes stands in the table

Run = tuple[int, int, int]
"""Chunks that follow one another in a data file: number of the file, offset, number of chunks."""

Place = bytes | tuple[int, int]
"""Where a chunk is: the bytes themselves, or their offset and length in the leaf's data file."""

JAX_ARRAY, NUMPY_ARRAY, NUMPY_SCALAR = "jax.Array", "np.ndarray", "np.generic"
SCALAR, STRING, NONE, PRNG_KEY = "scalar", "string", "None", "prng_key"
DICT, LIST, TUPLE, NAMED_TUPLE = "dict", "list", "tuple", "namedtuple"
ARRAY_KINDS = frozenset((JAX_ARRAY, NUMPY_ARRAY, NUMPY_SCALAR, SCALAR, PRNG_KEY))
EMPTY_CONTAINERS = frozenset((DICT, LIST, TUPLE, NAMED_TUPLE))
_KINDS = ARRAY_KINDS | EMPTY_CONTAINERS | {STRING, NONE}

# dtypes that zarr3 stores, by NumPy's names (tensorstore 0.1.86; raw bytes and zarr's encoding of
# each were compared and are the same).
STORABLE_DTYPES = frozenset(
    (
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128", "bfloat16"),
        *("float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
        *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)

# What taking apart JSON of another shape than the expected raises.
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError)

_MOST_COUNT = 2**63
MOST_AXES = 32  # of what tensorstore, and so Orbax, can open
_MOST_BYTES = 2**62  # of a leaf; beyond it even zarr's arithmetic ends

_HEAD = b'{"xxh3_128":"'
_MIDDLE = b'","table":'
_TABLE_AT = len(_HEAD) + 32 + len(_MIDDLE)
_DATA_PART = re.compile(r"[^/]+(/data\.[1-9][0-9]{0,8})?")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


# Boxes, leaves and their paths are never changed, but not frozen either: making a frozen one takes
# four times as long, and finalizing makes several for each leaf.
@dataclass(slots=True)
class Box:
    """A range of indices of a leaf, and of each of its chunks the digest and the place.

    Attributes:
      start: First index along each axis; a multiple of the chunk's length.
      shape: Number of indices along each axis.
      digests: xxh3-128 of each chunk's bytes as read (little-endian, C order, without padding), in
        hexadecimal, in C order of the chunks; empty where none were taken. A single digest is `""`
        where only that chunk has none.
      places: Where each chunk is, as stored, in the same order; of a part only.
    """

    start: Shape
    shape: Shape
    digests: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()


@dataclass(slots=True)
class Leaf:
    """A leaf, or the boxes of it that one part holds.

    Attributes:
      path: Where it stands in the tree.
      kind: One of the kinds named at the top of this module.
      dtype: NumPy name of the stored elements' dtype; empty for what has no data.
      shape: Global shape of the stored array (of a PRNG key: of its key data).
      chunk: Shape of a chunk of the stored array.
      compression: `zstd`, or None.
      generation: How often the leaf had been replaced when this was saved.
      sharding: Sharding in Orbax's terms.
      text: Value of a string; for a PRNG key, the name of its implementation.
      boxes: What is held of it.
      runs: In a checkpoint's contents, where its chunks are, in C order; empty where some stand in
        the database or are compressed.
      file: In a part, which of its data files holds them: 0 for the one written with it, `data`; n
        for `data.n`, which an earlier part shares with it.
    """

    path: KeyPath
    kind: str
    dtype: str = ""
    shape: Shape = ()
    chunk: Shape = ()
    compression: str | None = None
    generation: int = 0
    sharding: dict[str, Any] | None = None
    text: str = ""
    boxes: tuple[Box, ...] = ()
    runs: tuple[Run, ...] = ()
    file: int = 0

    @property
    def name(self) -> str:
        """The path's keys joined with a dot."""
        return self.path.name

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
        return math.prod(self.chunk) * self.numpy_dtype.itemsize if self.is_array else 0

    @property
    def bytes(self) -> int:
        """Size of the whole leaf's data in memory, in bytes."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize if self.is_array else 0

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
        return Leaf(
            path=self.path,
            kind=self.kind,
            dtype=self.dtype,
            shape=self.shape,
            chunk=self.chunk,
            compression=self.compression,
            generation=self.generation,
            sharding=self.sharding,
            text=self.text,
            boxes=boxes,
            runs=runs,
            file=file,
        )

    @property
    def is_one_chunk(self) -> bool:
        """Whether a single chunk holds the whole array."""
        return self.shape == self.chunk

    def keys_of(self, box: Box) -> Iterator[str]:
        """Yields the database key of each chunk of a box, in C order."""
        if self.shape == self.chunk and all(self.shape):
            return iter((f"{self.prefix}c" + "/0" * len(self.shape),))
        return chunk_keys(self.prefix, box.start, box.shape, self.chunk)


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
    """

    process: int
    time_ns: int
    custom_metadata: dict[str, Any]
    leaves: tuple[Leaf, ...]
    bytes: int
    durable: bool = False


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
    """

    started_ns: int
    committed_ns: int
    parts: int
    custom_metadata: dict[str, Any]
    leaves: tuple[Leaf, ...]
    data_parts: tuple[str, ...] = ()
    first_part: str = ""


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
    return name if "/" in name else f"{name}/{DATA_FILE}"


@lru_cache(maxsize=len(STORABLE_DTYPES))
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype called `name`, one of `STORABLE_DTYPES`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def check_json(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns custom metadata as JSON would give it back.

    Raises:
      UnsupportedLeafError: Some value would not come back as it is; the error says where it stands.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnsupportedLeafError(f"custom_metadata is a dict, not a {type(value).__name__}.")
    try:
        checked = {k: _json_value(v, f"[{k!r}]") for k, v in _with_text_keys(value, "")}
        _to_json(checked)
    except (ValueError, RecursionError) as error:  # lone surrogates, integers too long for Python
        raise UnsupportedLeafError(
            f"custom_metadata cannot be written as JSON: {type(error).__name__}: {error}. "
            "Save what is not text, a number of common size, or of common depth as a leaf."
        ) from error
    return checked


def _json_value(value: object, where: str) -> Any:
    if isinstance(value, Mapping):
        return {k: _json_value(v, f"{where}[{k!r}]") for k, v in _with_text_keys(value, where)}
    if isinstance(value, list):
        return [_json_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    is_plain = value is None or isinstance(value, (bool, int, str))
    if is_plain or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UnsupportedLeafError(
        f"custom_metadata{where} is {value!r}, a {type(value).__name__} that JSON cannot hold. "
        "Convert it to dicts, lists, strings, finite numbers, bools and None."
    )


def _with_text_keys(value: Mapping[Any, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if not isinstance(key, str):
            raise UnsupportedLeafError(f"custom_metadata{where} has key {key!r}: keys are strings.")
        yield key, item


def digest(data: bytes | memoryview) -> str:
    """xxh3-128 of `data`, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def digests_of(array: np.ndarray, chunk: Shape) -> Iterator[str]:
    """Yields the digest of each chunk of a box's data, in C order, without padding."""
    if array.shape == chunk:  # by far the most common, and cheaper than the general case
        yield digest(flat(array).data)
        return
    for region in chunk_regions(array.shape, chunk):
        yield digest(flat(array[region]).data)


def flat(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order, on one axis; the array's own memory where that has them."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def encode_part(part: Part) -> bytes:
    """Returns the bytes of a `part.json`."""
    head = {
        "process": part.process,
        "time_ns": part.time_ns,
        "bytes": part.bytes,
        "durable": part.durable,
    }
    return _encode(head, part.custom_metadata, part.leaves)


def encode_contents(contents: Contents) -> bytes:
    """Returns the bytes of a `contents.json`."""
    head = {
        "started_ns": contents.started_ns,
        "committed_ns": contents.committed_ns,
        "parts": contents.parts,
        "data_parts": contents.data_parts,
        "first_part": contents.first_part,
    }
    return _encode(head, contents.custom_metadata, contents.leaves)


def decode_part(data: bytes, *, where: str) -> Part:
    """Reads a `part.json`.

    Args:
      data: Bytes of the file.
      where: What the error calls it.

    Raises:
      CorruptCheckpointError: It is torn, damaged, or of a format that this version cannot read.
    """
    return _checked(_part_of, data, where)


def decode_contents(data: bytes, *, where: str) -> Contents:
    """Reads a `contents.json`; arguments and errors are those of `decode_part`."""
    return _checked(_contents_of, data, where)


def _encode(
    head: dict[str, Any], custom_metadata: dict[str, Any], leaves: tuple[Leaf, ...]
) -> bytes:
    shardings = _Shardings()
    rows = [_leaf_to_json(leaf, shardings) for leaf in leaves]
    table = {
        "format": FORMAT_VERSION,
        **head,
        "custom_metadata": custom_metadata,
        "shardings": shardings.listed,
        "leaves": rows,
    }
    body = _to_json(table)
    return b"".join((_HEAD, digest(body).encode(), _MIDDLE, body, b"}\n"))


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class _Shardings:
    """The shardings of a table, each once; leaves share their dictionaries, or make equal ones."""

    def __init__(self) -> None:
        self.listed: list[dict[str, Any]] = []
        self._by_text: dict[str, int] = {}
        self._by_identity: dict[int, int] = {}

    def number_of(self, sharding: dict[str, Any]) -> int:
        number = self._by_identity.get(id(sharding))
        if number is None:
            text = json.dumps(sharding)
            number = self._by_text.setdefault(text, len(self.listed))
            if number == len(self.listed):
                self.listed.append(sharding)
            self._by_identity[id(sharding)] = number
        return number


def _leaf_to_json(leaf: Leaf, shardings: _Shardings) -> dict[str, Any]:
    row: dict[str, Any] = {"path": leaf.path.texts, "keys": leaf.path.kinds, "kind": leaf.kind}
    if leaf.generation:
        row["generation"] = leaf.generation
    if leaf.text:
        row["text"] = leaf.text
    if leaf.is_array:
        row |= {"dtype": leaf.dtype, "shape": leaf.shape, "chunk": leaf.chunk}
        row["boxes"] = [_box_to_json(box, leaf) for box in leaf.boxes]
    if leaf.runs:
        row["runs"] = leaf.runs
    if leaf.file:
        row["file"] = leaf.file
    if leaf.compression:
        row["compression"] = leaf.compression
    if leaf.sharding is not None:
        row["sharding"] = shardings.number_of(leaf.sharding)
    return row


def _box_to_json(box: Box, leaf: Leaf) -> tuple[object, ...]:
    """A digest for each chunk, an empty one where none was taken; and its place, in a part."""
    digests = box.digests or ("",) * math.prod(chunk_counts(box.shape, leaf.chunk))
    if not box.places:
        return box.start, box.shape, digests
    places = [
        base64.b64encode(place).decode("ascii") if isinstance(place, bytes) else place
        for place in box.places
    ]
    return box.start, box.shape, digests, places


def _checked(build: Callable[[dict[str, Any]], T], data: bytes, where: str) -> T:
    """Decodes `data` with `build`, every failure being the file's."""
    try:
        return build(_open_envelope(data))
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from None
    except _MALFORMED as error:
        raise CorruptCheckpointError(
            f"{where}: not a table of contents ({type(error).__name__}: {error})"
        ) from error


def _open_envelope(data: bytes) -> dict[str, Any]:
    body = memoryview(data)[_TABLE_AT:-2]
    is_whole = data.startswith(_HEAD) and data.endswith(b"}\n") and bool(body)
    if not is_whole or not data.startswith(_MIDDLE, _TABLE_AT - len(_MIDDLE)):
        raise CorruptCheckpointError("it is torn, or not a table of contents")
    if digest(body) != data[len(_HEAD) : len(_HEAD) + 32].decode("ascii", "replace"):
        raise CorruptCheckpointError("its digest does not match: it is torn or damaged")
    table = json.loads(bytes(body))
    if _SURROGATE.search(body):
        _to_json(table)  # fails where it is a lone one, which no text or name can hold
    if table["format"] != FORMAT_VERSION:
        raise CorruptCheckpointError(
            f"it is of format {table['format']!r}, and this version of flax_partial reads "
            f"{FORMAT_VERSION}: read it with a newer version"
        )
    if not isinstance(table["custom_metadata"], dict):
        raise CorruptCheckpointError("custom_metadata is not an object")
    return dict(table)


def _part_of(table: dict[str, Any]) -> Part:
    part = Part(
        process=_integer(table["process"]),
        time_ns=_integer(table["time_ns"]),
        bytes=_integer(table["bytes"]),
        durable=table.get("durable") is True,
        custom_metadata=table["custom_metadata"],
        leaves=_leaves_of(table),
    )
    for leaf in part.leaves:
        for box in leaf.boxes:
            if len(box.places) != math.prod(chunk_counts(box.shape, leaf.chunk)):
                raise CorruptCheckpointError(f"leaf {leaf.name!r} has chunks without a place")
    return part


def _contents_of(table: dict[str, Any]) -> Contents:
    contents = Contents(
        started_ns=_integer(table["started_ns"]),
        committed_ns=_integer(table["committed_ns"]),
        parts=_integer(table["parts"]),
        custom_metadata=table["custom_metadata"],
        leaves=_leaves_of(table),
        data_parts=tuple(table["data_parts"]),
        first_part=str(table["first_part"]),
    )
    if not all(type(name) is str and _DATA_PART.fullmatch(name) for name in contents.data_parts):
        raise CorruptCheckpointError("a name of a part is none")
    for leaf in contents.leaves:
        if leaf.is_array and [box.shape for box in leaf.boxes] != [leaf.shape]:
            raise CorruptCheckpointError(f"leaf {leaf.name!r} is not one whole box")
        if leaf.runs:
            _require_runs(leaf, len(contents.data_parts))
    return contents


def _require_runs(leaf: Leaf, parts: int) -> None:
    total = math.prod(chunk_counts(leaf.shape, leaf.chunk))
    is_whole = sum(chunks for _, _, chunks in leaf.runs) == total and leaf.compression is None
    if not is_whole or any(part >= parts or not chunks for part, _, chunks in leaf.runs):
        raise CorruptCheckpointError(f"leaf {leaf.name!r} has runs that are not its chunks")


def _leaves_of(table: dict[str, Any]) -> tuple[Leaf, ...]:
    shardings = table["shardings"]
    leaves = []
    for row in table["leaves"]:
        try:
            leaves.append(_leaf_of(row, shardings))
        except _MALFORMED as error:
            raise CorruptCheckpointError(f"leaf {row.get('path')}: {error}") from error
    return tuple(leaves)


def _leaf_of(row: dict[str, Any], shardings: list[dict[str, Any]]) -> Leaf:
    kind, text, texts, kinds = row["kind"], row.get("text", ""), tuple(row["path"]), row["keys"]
    if kind not in _KINDS or len(texts) != len(kinds) or not KEY_KINDS.issuperset(kinds):
        raise ValueError("it has an unknown kind, or kind of key")
    if not all(type(key) is str for key in (text, kinds, *texts)):
        raise TypeError("a key, or the text, is no string")
    _require_numbers(texts, kinds)
    sharding, compression = row.get("sharding"), row.get("compression")
    if compression not in COMPRESSIONS:
        raise ValueError(f"it has unknown compression {compression!r}")
    is_array = kind in ARRAY_KINDS
    if is_array and row["dtype"] not in STORABLE_DTYPES:
        raise ValueError(f"it has unknown dtype {row['dtype']!r}")
    shape = _shape(row["shape"]) if is_array else ()
    chunk = _shape(row["chunk"]) if is_array else ()
    boxes: tuple[Box, ...] = ()
    if is_array:
        _require_array(kind, row["dtype"], shape, chunk)
        stored = None if compression else math.prod(chunk) * numpy_dtype(row["dtype"]).itemsize
        boxes = tuple([_box_of(box, shape, chunk, stored) for box in row["boxes"]])
    return Leaf(
        path=KeyPath(texts, kinds),
        kind=kind,
        dtype=row["dtype"] if is_array else "",
        shape=shape,
        chunk=chunk,
        compression=compression,
        generation=_integer(row.get("generation", 0)),
        sharding=None if sharding is None else shardings[_integer(sharding)],
        text=text,
        boxes=boxes,
        runs=tuple([_run_of(run) for run in row.get("runs", ())]),
        file=_integer(row.get("file", 0)),
    )


def _run_of(value: list[Any]) -> Run:
    part, offset, chunks = _shape(value)
    return part, offset, chunks


def _require_numbers(texts: tuple[str, ...], kinds: str) -> None:
    """Refuses indices, and integer keys, that are not spelled as Python would."""
    if TEXT_KEYS.issuperset(kinds):
        return
    for text, kind in zip(texts, kinds, strict=True):
        if kind not in TEXT_KEYS and (str(int(text)) != text or (kind == INDEX and text[0] == "-")):
            raise ValueError(f"{text!r} is not an index, or an integer key")


@lru_cache(maxsize=4096)  # arrays of a model have one of a few shapes
def _require_array(kind: str, dtype: str, shape: Shape, chunk: Shape) -> None:
    """Refuses what no array of the kind can be; memory for it is not asked for here."""
    if len(shape) > MOST_AXES:
        raise ValueError(f"it has {len(shape)} axes")
    if any(not 0 < step <= (size or 1) for size, step in zip(shape, chunk, strict=True)):
        raise ValueError(f"chunks of {list(chunk)} do not divide {list(shape)}")
    if math.prod(size or 1 for size in shape) * numpy_dtype(dtype).itemsize > _MOST_BYTES:
        raise ValueError(f"{list(shape)} is larger than any array")
    if shape and kind in (SCALAR, NUMPY_SCALAR):
        raise ValueError(f"it is a scalar of shape {list(shape)}")
    if kind == PRNG_KEY and dtype != "uint32":
        raise ValueError(f"it is a PRNG key of {dtype}")


def _box_of(row: list[Any], whole: Shape, chunk: Shape, stored: int | None) -> Box:
    """Checks a box; of a chunk as it is stored, so many bytes, or any number where that is None."""
    start, shape, digests = _shape(row[0]), _shape(row[1]), tuple(row[2])
    places = [_place_of(place, stored) for listed in row[3:] for place in listed]
    if not all(type(value) is str for value in digests):
        raise TypeError("a digest is no string")
    if len(shape) == len(start) and shape == whole == chunk and not any(start) and all(shape):
        chunks = 1  # by far the most common, and cheaper than the general case
    else:
        for at, size, end, step in zip(start, shape, whole, chunk, strict=True):
            last = at + size
            if last > end or at % step or (last % step and last != end):
                raise ValueError("it has a box that is not in its grid")
        chunks = math.prod(chunk_counts(shape, chunk))
    if len(digests) != chunks:
        raise ValueError(f"it has {len(digests)} digests for {chunks} chunks")
    return Box(start, shape, digests if any(digests) else (), tuple(places))


def _place_of(value: Any, stored: int | None) -> Place:
    if isinstance(value, str):
        place: Place = base64.b64decode(value, validate=True)
        size = len(place)
    else:
        offset, size = _shape(value)
        place = offset, size
    if stored not in (None, size):
        raise ValueError(f"it has a chunk of {size} bytes, not {stored}")
    return place


def _shape(value: list[Any]) -> Shape:
    for size in value:
        if type(size) is not int or size < 0:
            raise TypeError(f"{size!r} is not a count")
    return tuple(value)


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_COUNT:
        raise TypeError(f"{value!r} is not a count")
    return value
