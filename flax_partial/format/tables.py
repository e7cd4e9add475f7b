"""Tables of contents: what one part holds (`part.json`), what a checkpoint holds (`contents.json`).

Both are JSON, `{"xxh3_128":"<32 hex digits>","table":{...}}`, the digest being that of the table's
bytes. A whole, valid `part.json` is the commit of its part: what `decode_part` accepts was saved.
The structs below are the specification of `docs/format.md`: names, types, bounds.

Decoding trusts nothing: it checks the digest, every type and size, and that boxes, chunks and
digests agree. Each chunk has its entry, with a digest or not, so that no table can claim more
chunks than it is long: what works on chunks takes memory and time as the table does. A field that
this version does not know is skipped, a value that it does not know is an error, and so is a name
in `requires` that it does not know: there a later version says what must not be skipped.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.chunks import Shape, chunk_counts
from flax_partial.format.digests import digest
from flax_partial.format.keypaths import INDEX, KEY_KINDS, TEXT_KEYS, KeyPath
from flax_partial.format.metadata import to_json
from flax_partial.format.model import (
    ARRAY_KINDS,
    EMPTY_CONTAINERS,
    MOST_AXES,
    MOST_BYTES,
    NUMPY_SCALAR,
    PRNG_KEY,
    SCALAR,
    Box,
    Compression,
    Contents,
    Count,
    Dtype,
    Kind,
    Leaf,
    Part,
    Run,
    numpy_dtype,
)

T = TypeVar("T")

FORMAT_VERSION = 3
_READ_VERSIONS = frozenset((2, FORMAT_VERSION))  # what version 2 lacks is optional in version 3
_FIRST_INLINE = 3  # the first version whose contents hold inline chunks
_KNOWN_FEATURES: frozenset[str] = frozenset()  # what `requires` may name

_HEAD = b'{"xxh3_128":"'
_MIDDLE = b'","table":'
_TABLE_AT = len(_HEAD) + 32 + len(_MIDDLE)
_DATA_FILE = r"(p[0-9]{1,9}/)?[^/]+(/data\.[1-9][0-9]{0,8})?"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Row(Struct, gc=False, omit_defaults=True):
    """A leaf, as a table has it."""

    path: tuple[str, ...]
    keys: str
    kind: Kind
    generation: Count = 0
    text: str = ""
    data: bytes = b""
    placeholder: bool = False
    dtype: Dtype | None = None
    shape: tuple[Count, ...] = ()
    chunk: tuple[Count, ...] = ()
    boxes: tuple[Box, ...] = ()
    runs: tuple[Run, ...] = ()
    file: Count = 0
    compression: Compression | None = None
    sharding: Count | None = None


class _Head(Struct, gc=False):
    """What every reader reads of a table, of whatever version."""

    format: int
    requires: tuple[str, ...] = ()


class _PartTable(Struct, gc=False, omit_defaults=True, kw_only=True):
    """The table of a `part.json`."""

    format: int
    process: Count
    time_ns: Count
    bytes: Count
    durable: bool = False
    custom_metadata: Raw
    shardings: tuple[Raw, ...]
    leaves: tuple[_Row, ...]


class _ContentsTable(Struct, gc=False, omit_defaults=True):
    """The table of a `contents.json`."""

    format: int
    started_ns: Count
    committed_ns: Count
    parts: Count
    custom_metadata: Raw
    shardings: tuple[Raw, ...]
    leaves: tuple[_Row, ...]
    data_parts: tuple[Annotated[str, Meta(pattern=f"^{_DATA_FILE}$")], ...]
    first_part: str


_HEAD_DECODER = msgspec.json.Decoder(_Head)
_PART_DECODER = msgspec.json.Decoder(_PartTable)
_CONTENTS_DECODER = msgspec.json.Decoder(_ContentsTable)


def encode_part(part: Part) -> bytes:
    """Returns the bytes of a `part.json`."""
    shardings = _Shardings()
    rows = _rows_of(part.leaves, shardings)
    table = _PartTable(
        format=FORMAT_VERSION,
        process=part.process,
        time_ns=part.time_ns,
        bytes=part.bytes,
        durable=part.durable,
        custom_metadata=Raw(to_json(part.custom_metadata)),
        shardings=tuple(shardings.listed),
        leaves=rows,
    )
    return _enveloped(table)


def encode_contents(contents: Contents) -> bytes:
    """Returns the bytes of a `contents.json`."""
    shardings = _Shardings()
    rows = _rows_of(contents.leaves, shardings)
    table = _ContentsTable(
        format=FORMAT_VERSION,
        started_ns=contents.started_ns,
        committed_ns=contents.committed_ns,
        parts=contents.parts,
        custom_metadata=Raw(to_json(contents.custom_metadata)),
        shardings=tuple(shardings.listed),
        leaves=rows,
        data_parts=contents.data_parts,
        first_part=contents.first_part,
    )
    return _enveloped(table)


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


def _enveloped(table: Struct) -> bytes:
    body = msgspec.json.encode(table)
    return b"".join((_HEAD, digest(body).encode(), _MIDDLE, body, b"}\n"))


class _Shardings:
    """The shardings of a table, each once; leaves share their dictionaries, or make equal ones."""

    def __init__(self) -> None:
        self.listed: list[Raw] = []
        self._by_text: dict[bytes, int] = {}
        self._by_identity: dict[int, int] = {}

    def number_of(self, sharding: dict[str, Any]) -> int:
        number = self._by_identity.get(id(sharding))
        if number is None:
            text = to_json(sharding)
            number = self._by_text.setdefault(text, len(self.listed))
            if number == len(self.listed):
                self.listed.append(Raw(text))
            self._by_identity[id(sharding)] = number
        return number


def _rows_of(leaves: Iterable[Leaf], shardings: _Shardings) -> tuple[_Row, ...]:
    return tuple(
        [
            _Row(
                leaf.path.texts,
                leaf.path.kinds,
                leaf.kind,  # type: ignore[arg-type] # what is encoded is not checked
                leaf.generation,
                leaf.text,
                leaf.data,
                leaf.placeholder,
                leaf.dtype or None,  # type: ignore[arg-type]
                leaf.shape,
                leaf.chunk,
                _with_entries(leaf),
                leaf.runs,
                leaf.file,
                leaf.compression,  # type: ignore[arg-type]
                None if leaf.sharding is None else shardings.number_of(leaf.sharding),
            )
            for leaf in leaves
        ]
    )


def _with_entries(leaf: Leaf) -> tuple[Box, ...]:
    """The boxes of a leaf with a digest for each chunk, an empty one where none was taken."""
    if all(box.digests for box in leaf.boxes):
        return leaf.boxes
    counts = [math.prod(chunk_counts(box.shape, leaf.chunk)) for box in leaf.boxes]
    return tuple(
        Box(box.start, box.shape, box.digests or ("",) * count, box.places)
        for box, count in zip(leaf.boxes, counts, strict=True)
    )


def _checked(build: Callable[[memoryview], T], data: bytes, where: str) -> T:
    """Decodes `data` with `build`, every failure being the file's."""
    try:
        return build(_open_envelope(data))
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{where}: not a table of contents ({type(error).__name__}: {error})"
        ) from error


def _open_envelope(data: bytes) -> memoryview:
    body = memoryview(data)[_TABLE_AT:-2]
    is_whole = data.startswith(_HEAD) and data.endswith(b"}\n") and bool(body)
    if not is_whole or not data.startswith(_MIDDLE, _TABLE_AT - len(_MIDDLE)):
        raise CorruptCheckpointError("it is torn, or not a table of contents")
    if digest(body) != data[len(_HEAD) : len(_HEAD) + 32].decode("ascii", "replace"):
        raise CorruptCheckpointError("its digest does not match: it is torn or damaged")
    head = _HEAD_DECODER.decode(body)
    if head.format not in _READ_VERSIONS:
        raise CorruptCheckpointError(
            f"it is of format {head.format!r}, and this version of flax_partial reads "
            f"{FORMAT_VERSION}: read it with a newer version"
        )
    unknown = [name for name in head.requires if name not in _KNOWN_FEATURES]
    if unknown:
        raise CorruptCheckpointError(
            f"it requires {', '.join(map(repr, unknown))}, which this version of flax_partial does "
            "not know: read it with a newer version"
        )
    return body


def _part_of(body: memoryview) -> Part:
    table = _PART_DECODER.decode(body)
    return Part(
        process=table.process,
        time_ns=table.time_ns,
        bytes=table.bytes,
        durable=table.durable,
        custom_metadata=_object_of(table.custom_metadata),
        leaves=_leaves_of(table.leaves, table.shardings, need_places=True),
    )


def _contents_of(body: memoryview) -> Contents:
    table = _CONTENTS_DECODER.decode(body)
    contents = Contents(
        started_ns=table.started_ns,
        committed_ns=table.committed_ns,
        parts=table.parts,
        custom_metadata=_object_of(table.custom_metadata),
        leaves=_leaves_of(table.leaves, table.shardings, need_places=False),
        data_parts=table.data_parts,
        first_part=table.first_part,
        has_inline=table.format >= _FIRST_INLINE,
    )
    if not contents.leaves:
        raise CorruptCheckpointError("it holds no leaf")
    for leaf in contents.leaves:
        if not leaf.is_array:
            continue
        if len(leaf.boxes) != 1 or leaf.boxes[0].shape != leaf.shape:
            raise CorruptCheckpointError(f"leaf {leaf.name!r} is not one whole box")
        if leaf.runs:
            _require_runs(leaf, len(contents.data_parts))
        if leaf.boxes[0].places:
            _require_inline(leaf)
    return contents


def _object_of(raw: Raw) -> dict[str, Any]:
    """Decodes an object that a user gave as JSON: numbers are Python's, of any length."""
    text = bytes(raw)
    value = json.loads(text)
    if not isinstance(value, dict):
        raise CorruptCheckpointError("custom_metadata, or a sharding, is not an object")
    if _SURROGATE.search(text):
        to_json(value)  # fails where it is a lone one, which no text or name can hold
    return value


def _require_runs(leaf: Leaf, parts: int) -> None:
    total = math.prod(chunk_counts(leaf.shape, leaf.chunk))
    is_whole = sum(chunks for _, _, chunks in leaf.runs) == total and leaf.compression is None
    if not is_whole or any(part >= parts or not chunks for part, _, chunks in leaf.runs):
        raise CorruptCheckpointError(f"leaf {leaf.name!r} has runs that are not its chunks")


def _require_inline(leaf: Leaf) -> None:
    (box,) = leaf.boxes
    is_plain = leaf.compression is None and not leaf.runs
    is_whole = len(box.places) == math.prod(chunk_counts(leaf.shape, leaf.chunk))
    if not (is_plain and is_whole and all(isinstance(place, bytes) for place in box.places)):
        raise CorruptCheckpointError(f"leaf {leaf.name!r} has places that are not its chunks")


def _leaves_of(
    rows: Iterable[_Row], texts: Iterable[Raw], *, need_places: bool
) -> tuple[Leaf, ...]:
    shardings = tuple(map(_object_of, texts))
    leaves = []
    for row in rows:
        try:
            leaves.append(_leaf_of(row, shardings, need_places))
        except (ValueError, IndexError) as error:
            raise CorruptCheckpointError(f"leaf {list(row.path)}: {error}") from error
    return tuple(leaves)


def _leaf_of(row: _Row, shardings: tuple[dict[str, Any], ...], need_places: bool) -> Leaf:  # noqa: FBT001
    if _has_numbers(row.keys, len(row.path)):
        _require_numbers(row.path, row.keys)
    path = KeyPath(row.path, row.keys)
    sharding = None if row.sharding is None else shardings[row.sharding]
    kind = row.kind
    if kind not in ARRAY_KINDS:
        if row.placeholder and kind not in EMPTY_CONTAINERS:
            raise ValueError("it is a placeholder, and no empty container")
        return Leaf(
            path,
            kind,
            generation=row.generation,
            sharding=sharding,
            text=row.text,
            data=row.data,
            placeholder=row.placeholder,
        )
    form = _form_of(kind, row.dtype, row.shape, row.chunk, row.compression)
    for box in row.boxes:
        _require_box(box, form, need_places)
    return Leaf(
        path,
        kind,
        form.dtype,
        form.shape,
        form.chunk,
        row.compression,
        row.generation,
        sharding,
        row.text,
        row.boxes,
        row.runs,
        row.file,
    )


@lru_cache(maxsize=4096)  # most leaves have one of a few depths
def _has_numbers(kinds: str, count: int) -> bool:
    if len(kinds) != count or not KEY_KINDS.issuperset(kinds):
        raise ValueError("it has an unknown kind of key, or a key without one")
    return not TEXT_KEYS.issuperset(kinds)


def _require_numbers(texts: tuple[str, ...], kinds: str) -> None:
    """Refuses indices, and integer keys, that are not spelled as Python would."""
    for text, kind in zip(texts, kinds, strict=True):
        if kind not in TEXT_KEYS and (str(int(text)) != text or (kind == INDEX and text[0] == "-")):
            raise ValueError(f"{text!r} is not an index, or an integer key")


class _Form(Struct, gc=False):
    """What array leaves have in common that are stored alike; those of a table share its objects.

    Attributes:
      dtype: As in `Leaf`.
      shape: As in `Leaf`.
      chunk: As in `Leaf`; the very same object as `shape` where one chunk holds the array.
      origin: Where the array begins.
      is_one_chunk: Whether one chunk holds the array.
      stored_bytes: Size of a chunk as it is stored; None where that may be any.
    """

    dtype: str
    shape: Shape
    chunk: Shape
    origin: Shape
    is_one_chunk: bool
    stored_bytes: int | None


@lru_cache(maxsize=4096)  # arrays of a model have one of a few shapes
def _form_of(
    kind: str, dtype: str | None, shape: Shape, chunk: Shape, compression: str | None
) -> _Form:
    """Refuses what no array of the kind can be; memory for it is not asked for here."""
    if dtype is None:
        raise ValueError("it has no dtype")
    if len(shape) > MOST_AXES:
        raise ValueError(f"it has {len(shape)} axes")
    if any(not 0 < step <= (size or 1) for size, step in zip(shape, chunk, strict=True)):
        raise ValueError(f"chunks of {list(chunk)} do not divide {list(shape)}")
    itemsize = numpy_dtype(dtype).itemsize
    if math.prod(size or 1 for size in shape) * itemsize > MOST_BYTES:
        raise ValueError(f"{list(shape)} is larger than any array")
    if shape and kind in (SCALAR, NUMPY_SCALAR):
        raise ValueError(f"it is a scalar of shape {list(shape)}")
    if kind == PRNG_KEY and dtype != "uint32":
        raise ValueError(f"it is a PRNG key of {dtype}")
    return _Form(
        dtype,
        shape,
        shape if chunk == shape else chunk,
        (0,) * len(shape),
        chunk == shape and all(shape),
        None if compression else math.prod(chunk) * itemsize,
    )


def _require_box(box: Box, form: _Form, need_places: bool) -> None:  # noqa: FBT001 - 100,000 calls
    if form.is_one_chunk and box.shape == form.shape and box.start == form.origin:
        chunks = 1  # by far the most common, and cheaper than the general case
        box.start, box.shape = form.origin, form.shape
    else:
        for at, size, end, step in zip(box.start, box.shape, form.shape, form.chunk, strict=True):
            last = at + size
            if last > end or at % step or (last % step and last != end):
                raise ValueError("it has a box that is not in its grid")
        chunks = math.prod(chunk_counts(box.shape, form.chunk))
    if len(box.digests) != chunks:
        raise ValueError(f"it has {len(box.digests)} digests for {chunks} chunks")
    if not any(box.digests):
        box.digests = ()
    if need_places and len(box.places) != chunks:
        raise ValueError("it has chunks without a place")
    if form.stored_bytes is None:
        return
    for place in box.places:
        size = len(place) if isinstance(place, bytes) else place[1]
        if size != form.stored_bytes:
            raise ValueError(f"it has a chunk of {size} bytes, not {form.stored_bytes}")
