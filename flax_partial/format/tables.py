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
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.chunks import Shape, chunk_counts
from flax_partial.format.digests import digest
from flax_partial.format.keypaths import INDEX, KEY_KINDS, TEXT_KEYS, KeyPath
from flax_partial.format.metadata import to_json
from flax_partial.format.model import (
    ARRAY_KINDS,
    KINDS,
    MOST_AXES,
    NUMPY_SCALAR,
    PRNG_KEY,
    SCALAR,
    STORABLE_DTYPES,
    Box,
    Contents,
    Leaf,
    Part,
    Place,
    Run,
    numpy_dtype,
)
from flax_partial.options import COMPRESSIONS

T = TypeVar("T")

FORMAT_VERSION = 2

# What taking apart JSON of another shape than the expected raises.
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError)

_MOST_COUNT = 2**63
_MOST_BYTES = 2**62  # of a leaf; beyond it even zarr's arithmetic ends

_HEAD = b'{"xxh3_128":"'
_MIDDLE = b'","table":'
_TABLE_AT = len(_HEAD) + 32 + len(_MIDDLE)
_DATA_PART = re.compile(r"[^/]+(/data\.[1-9][0-9]{0,8})?")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


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
    body = to_json(table)
    return b"".join((_HEAD, digest(body).encode(), _MIDDLE, body, b"}\n"))


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
        to_json(table)  # fails where it is a lone one, which no text or name can hold
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
    if not contents.leaves:
        raise CorruptCheckpointError("it has no leaves")
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
    if kind not in KINDS or len(texts) != len(kinds) or not KEY_KINDS.issuperset(kinds):
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
