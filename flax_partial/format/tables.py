"""Tables of contents: what one part holds (`part.json`), what a checkpoint holds (`contents.json`).

Both are JSON, `{"xxh3_128":"<32 hex digits>","table":{...}}`, the digest being that of the table's
bytes. A whole, valid `part.json` is the commit of its part: what `decode_part` accepts was saved.
The structs below, and `Leaf` and `Box`, are the specification of `docs/format.md`: names, types,
bounds.

Decoding trusts nothing: it checks the digest, every type and size, and that boxes, chunks and
digests agree. Each chunk has its entry, with a digest or not, so that no table can claim more
chunks than it is long: what works on chunks takes memory and time as the table does. A field that
this version does not define is skipped; an undefined value is an error, and so is an undefined
name in `requires`, where a later version lists the fields that must not be skipped.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.chunks import Shape, chunk_counts
from flax_partial.format.digests import digest
from flax_partial.format.keypaths import INDEX, KEY_KINDS, TEXT_KEYS
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
    Contents,
    Count,
    Leaf,
    Part,
    Sharding,
    numpy_dtype,
)

T = TypeVar("T")
_Hook = Callable[[type, object], Sharding]

FORMAT_VERSION = 3
_READ_VERSIONS = frozenset((2, FORMAT_VERSION))  # what version 2 lacks is optional in version 3
_FIRST_INLINE = 3  # the first version whose contents hold inline chunks
_KNOWN_FEATURES: frozenset[str] = frozenset()  # what `requires` may name

_HEAD = b'{"xxh3_128":"'
_MIDDLE = b'","table":'
_TABLE_AT = len(_HEAD) + 32 + len(_MIDDLE)
_DATA_FILE = r"(p[0-9]{1,9}/)?[^/]+(/data\.[1-9][0-9]{0,8})?"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOTHING = Raw(b"{}")


class _Head(Struct, gc=False):
    """What every reader reads of a table, of whatever version."""

    format: int
    requires: tuple[str, ...] = ()
    shardings: Raw = Raw(b"[]")


class _PartTable(Struct, gc=False, omit_defaults=True, kw_only=True):
    """The table of a `part.json`."""

    format: int
    process: Count
    time_ns: Count
    bytes: Count
    durable: bool = False
    custom_metadata: Raw
    shardings: tuple[Raw, ...]
    leaves: tuple[Leaf, ...]
    training: Raw = _NOTHING


class _ContentsTable(Struct, gc=False, omit_defaults=True):
    """The table of a `contents.json`."""

    format: int
    started_ns: Count
    committed_ns: Count
    parts: Count
    custom_metadata: Raw
    shardings: tuple[Raw, ...]
    leaves: tuple[Leaf, ...]
    data_parts: tuple[Annotated[str, Meta(pattern=f"^{_DATA_FILE}$")], ...]
    first_part: str
    training: Raw = _NOTHING


_HEAD_DECODER = msgspec.json.Decoder(_Head)
# msgspec (0.22) prepares the decoding of a type at the first call, and another thread that calls
# meanwhile finds it incomplete, which ends the process. Only one thread runs an import.
for _table in (_PartTable, _ContentsTable):
    msgspec.json.Decoder(_table)


def encode_part(part: Part) -> bytes:
    """Returns the bytes of a `part.json`."""
    return _encoded(_PartTable, part)


def encode_contents(contents: Contents) -> bytes:
    """Returns the bytes of a `contents.json`."""
    return _encoded(_ContentsTable, contents)


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


def _encoded(table_type: type[Struct], value: Part | Contents) -> bytes:
    """Encodes a table, which has the fields of `value`; what users give stands in it as JSON."""
    shardings = _Shardings(value.leaves)
    fields: dict[str, Any] = {name: getattr(value, name) for name in _fields_of(table_type)}
    fields["custom_metadata"] = Raw(to_json(value.custom_metadata))
    # A table without it is as earlier versions wrote it: msgspec omits this very object.
    fields["training"] = Raw(to_json(value.training)) if value.training else _NOTHING
    fields["leaves"] = _with_entries(value.leaves)
    table = table_type(format=FORMAT_VERSION, shardings=shardings.texts, **fields)
    body = msgspec.json.encode(table, enc_hook=shardings.number_of)
    return b"".join((_HEAD, digest(body).encode(), _MIDDLE, body, b"}\n"))


def _fields_of(table_type: type[Struct]) -> Iterator[str]:
    """The names of a table's fields but for those that `Part` and `Contents` lack."""
    names = table_type.__struct_fields__
    return (name for name in names if name not in ("format", "shardings"))


class _Shardings:
    """The shardings of a table, each once."""

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        found = {id(leaf.sharding): leaf.sharding for leaf in leaves if leaf.sharding is not None}
        texts = {number: to_json(sharding.json) for number, sharding in found.items()}
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts.values()))}
        self.texts = tuple(map(Raw, numbers))
        self._numbers = {identity: numbers[text] for identity, text in texts.items()}

    def number_of(self, sharding: object) -> int:
        return self._numbers[id(sharding)]


def _with_entries(leaves: Iterable[Leaf]) -> tuple[Leaf, ...]:
    """The leaves with a digest for each of their chunks, an empty one where none was taken."""
    return tuple(
        [_filled(leaf) if () in [b.digests for b in leaf.boxes] else leaf for leaf in leaves]
    )


def _filled(leaf: Leaf) -> Leaf:
    counts = [math.prod(chunk_counts(box.shape, leaf.chunk)) for box in leaf.boxes]
    boxes = [
        Box(box.start, box.shape, box.digests or ("",) * count, box.places)
        for box, count in zip(leaf.boxes, counts, strict=True)
    ]
    return leaf.with_boxes(tuple(boxes), leaf.runs, leaf.file)


def _checked(build: Callable[[memoryview, _Hook], T], data: bytes, where: str) -> T:
    """Decodes `data` with `build`, every failure being the file's."""
    try:
        body, head = _open_envelope(data)
        return build(body, _sharding_hook(head.shardings))
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{where}: not a table of contents ({type(error).__name__}: {error})"
        ) from error


def _open_envelope(data: bytes) -> tuple[memoryview, _Head]:
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
    return body, head


def _sharding_hook(table: Raw) -> _Hook:
    """Returns how msgspec is to decode the number of a sharding."""
    texts = msgspec.json.decode(table, type=list[Raw])
    shardings = [Sharding(_object_of(text)) for text in texts]

    def sharding_of(_: type, number: object) -> Sharding:
        if type(number) is not int or not 0 <= number < len(shardings):
            raise ValueError(f"{number!r} is not one of {len(shardings)} shardings")
        return shardings[number]

    return sharding_of


def _part_of(body: memoryview, hook: _Hook) -> Part:
    table = msgspec.json.decode(body, type=_PartTable, dec_hook=hook)
    _require_each(table.leaves)
    return Part(**_decoded(table))


def _contents_of(body: memoryview, hook: _Hook) -> Contents:
    table = msgspec.json.decode(body, type=_ContentsTable, dec_hook=hook)
    if not table.leaves:
        raise CorruptCheckpointError("it holds no leaf")
    _require_each(table.leaves, data_parts=len(table.data_parts))
    return Contents(**_decoded(table), has_inline=table.format >= _FIRST_INLINE)


def _decoded(table: Struct) -> dict[str, Any]:
    fields = {name: getattr(table, name) for name in _fields_of(type(table))}
    return {
        name: _object_of(field) if isinstance(field, Raw) else field
        for name, field in fields.items()
    }


def _object_of(raw: Raw) -> dict[str, Any]:
    """Decodes an object that a user gave as JSON: numbers are Python's, of any length."""
    text = bytes(raw)
    value = json.loads(text)
    if not isinstance(value, dict):
        raise CorruptCheckpointError("custom_metadata, training, or a sharding, is not an object")
    if _SURROGATE.search(text):
        to_json(value)  # fails where it is a lone one, which no text or name can hold
    return value


def _require_each(leaves: Iterable[Leaf], *, data_parts: int | None = None) -> None:
    """Checks leaves, and gives those that are alike the same tuples.

    Args:
      leaves: The leaves of a table.
      data_parts: Of a checkpoint's contents, the number of data files; None for a part.
    """
    for leaf in leaves:
        try:
            _require_leaf(leaf, data_parts)
        except ValueError as error:
            raise CorruptCheckpointError(f"leaf {list(leaf.texts)}: {error}") from error


def _require_leaf(leaf: Leaf, data_parts: int | None) -> None:
    leaf.key_kinds = sys.intern(leaf.key_kinds)
    if _has_numbers(leaf.key_kinds, len(leaf.texts)):
        _require_numbers(leaf.texts, leaf.key_kinds)
    if leaf.placeholder and leaf.kind not in EMPTY_CONTAINERS:
        raise ValueError("it is a placeholder, and no empty container")
    if leaf.kind not in ARRAY_KINDS:
        if leaf.dtype or leaf.boxes or leaf.runs:
            raise ValueError("it is no array, and has the data of one")
        return
    form = _form_of(leaf.kind, leaf.dtype, leaf.shape, leaf.chunk, leaf.compression)
    leaf.shape, leaf.chunk = form.shape, form.chunk
    if data_parts is None:
        _require_held(leaf, form)
    else:
        _require_whole(leaf, form, data_parts)


def _require_held(leaf: Leaf, form: "_Form") -> None:
    """Refuses boxes that no part can hold of an array."""
    for box in leaf.boxes:
        if len(box.places) != _require_box(box, form):
            raise ValueError("it has chunks without a place")


def _require_whole(leaf: Leaf, form: "_Form", data_parts: int) -> None:
    """Refuses an array that is not whole, or whose chunks are nowhere."""
    if len(leaf.boxes) != 1 or leaf.boxes[0].shape != leaf.shape:
        raise ValueError("it is not one whole box")
    (box,) = leaf.boxes
    chunks = _require_box(box, form)
    if leaf.runs:
        is_whole = sum(run[2] for run in leaf.runs) == chunks and leaf.compression is None
        if not is_whole or any(part >= data_parts or not run for part, _, run in leaf.runs):
            raise ValueError("it has runs that are not its chunks")
    if box.places:
        is_plain = leaf.compression is None and not leaf.runs
        if not is_plain or len(box.places) != chunks or tuple in map(type, box.places):
            raise ValueError("it has places that are not its chunks")


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
      shape: As in `Leaf`.
      chunk: As in `Leaf`; the very same object as `shape` where one chunk holds the array.
      origin: Where the array begins.
      is_one_chunk: Whether one chunk holds the array.
      stored_bytes: Size of a chunk as it is stored; None where that may be any.
    """

    shape: Shape
    chunk: Shape
    origin: Shape
    is_one_chunk: bool
    stored_bytes: int | None


@lru_cache(maxsize=4096)  # arrays of a model have one of a few shapes
def _form_of(kind: str, dtype: str, shape: Shape, chunk: Shape, compression: str | None) -> _Form:
    """Raises for what no array of the kind can be; allocates nothing for it."""
    if not dtype:
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
        shape,
        shape if chunk == shape else chunk,
        (0,) * len(shape),
        chunk == shape and all(shape),
        None if compression else math.prod(chunk) * itemsize,
    )


def _require_box(box: Box, form: _Form) -> int:
    """Raises for a box outside of the array; returns the number of its chunks."""
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
    if form.stored_bytes is not None:
        for place in box.places:
            size = len(place) if isinstance(place, bytes) else place[1]
            if size != form.stored_bytes:
                raise ValueError(f"it has a chunk of {size} bytes, not {form.stored_bytes}")
    return chunks
