"""Writes an OCDBT database as tensorstore reads it. Pure: entries in, the bytes of two files out.

A database is a manifest, which names the root of a B+tree, and the tree's nodes, which lie in one
data file here. A leaf node holds small values, and refers to large ones by file, offset and length:
that is how a checkpoint takes over the parts' data without copying it. The same entries always give
the same bytes, so that a database can be checked by making it again.

The format: "Storage format" in the documentation of tensorstore's OCDBT driver. Every node and the
manifest end in a CRC-32C of their own, so that damage to them never reads as data.
"""

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import google_crc32c
import numpy as np

_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
_UNVERSIONED_UNCOMPRESSED = b"\0\0"
_HEADER = struct.Struct(">I")
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_OVERHEAD = _HEADER.size + _LENGTH.size + len(_UNVERSIONED_UNCOMPRESSED) + _CHECKSUM.size
# A reader of one leaf fetches one node of each height: large ones make few leaves dear to read,
# small ones make trees high.
_NODE_BYTES = 256 * 1024
_NODE_ENTRIES = 4096
# What a later writer takes from the configuration; readers ignore it.
_MAX_INLINE_BYTES, _MAX_NODE_BYTES, _VERSION_TREE_ARITY_LOG2 = 1024, 8 << 20, 4
_INLINE, _REFERENCE = 0, 1
_MOST_COMPARED_AT_ONCE = 256  # bytes of a key: 1 MiB for the keys of a node


class Reference(NamedTuple):
    """A value that lies in a file.

    Attributes:
      file: Path of the file, relative to the database's directory.
      offset: Where in it the value begins, in bytes.
      length: Size of the value, in bytes.
    """

    file: str
    offset: int
    length: int


Value = bytes | Reference
Entry = tuple[bytes, Value]


class _Node(NamedTuple):
    """An encoded node: its first key, where it is stored, and what its parent records of it."""

    first_key: bytes
    file: str
    offset: int
    length: int
    keys: int
    tree_bytes: int
    referred_bytes: int


def encode(
    entries: Iterable[Entry], *, data_file: str, uuid: bytes, commit_ns: int
) -> tuple[bytes, list[bytes]]:
    """Returns the manifest, and the data file piece by piece, of a database that holds `entries`.

    Args:
      entries: Keys and values, in any order; at least one, and no key twice.
      data_file: Path of the data file, relative to the database's directory.
      uuid: Identifies the database, 16 bytes.
      commit_ns: When it was committed, in nanoseconds since the epoch.
    """
    data: list[bytes] = []
    size = height = 0
    level: Sequence[tuple[bytes, Value | _Node]] = sorted(entries)
    while True:
        nodes: list[_Node] = []
        for group in _split(level):
            encoded = _encode_node(group, height)
            nodes.append(_node_of(group, data_file, size, len(encoded)))
            data.append(encoded)
            size += len(encoded)
        if len(nodes) == 1:
            return _encode_manifest(nodes[0], height, uuid, commit_ns), data
        level, height = [(node.first_key, node) for node in nodes], height + 1


def _split(
    level: Sequence[tuple[bytes, Value | _Node]],
) -> Iterable[Sequence[tuple[bytes, Value | _Node]]]:
    """Cuts a level into nodes of about equal size."""
    first, size = 0, 0
    for at, (key, value) in enumerate(level):
        size += len(key) + (len(value) if isinstance(value, bytes) else 16)
        if size >= _NODE_BYTES or at - first + 1 == _NODE_ENTRIES:
            yield level[first : at + 1]
            first, size = at + 1, 0
    if first < len(level):
        yield level[first:]


def _node_of(
    group: Sequence[tuple[bytes, Value | _Node]], file: str, offset: int, length: int
) -> _Node:
    children = [value for _, value in group if isinstance(value, _Node)]
    referred = sum([value.length for _, value in group if isinstance(value, Reference)])
    return _Node(
        group[0][0],
        file,
        offset,
        length,
        keys=sum(child.keys for child in children) or len(group),
        tree_bytes=length + sum(child.tree_bytes for child in children),
        referred_bytes=referred + sum(child.referred_bytes for child in children),
    )


def _encode_node(group: Sequence[tuple[bytes, Value | _Node]], height: int) -> bytes:
    values = [value for _, value in group]
    inline = [value for value in values if isinstance(value, bytes)]
    references = [value for value in values if not isinstance(value, bytes)]
    table, numbers = _file_table({reference.file for reference in references})
    body = [bytes((height,)), table, _varints([len(group)]), *_keys([key for key, _ in group])]
    if height:
        body.insert(-1, bytes(len(group)))  # a child's keys are stored whole, without a prefix
    else:
        body.append(_varints([len(v) if isinstance(v, bytes) else v.length for v in values]))
        body.append(bytes([_INLINE if isinstance(v, bytes) else _REFERENCE for v in values]))
    body.append(_varints([numbers[reference.file] for reference in references]))
    body.append(_varints([reference.offset for reference in references]))
    if height:
        body.append(_varints([reference.length for reference in references]))
        body += _statistics([value for value in values if isinstance(value, _Node)])
    return _enclosed(_NODE_MAGIC, [*body, *inline])


def _keys(keys: Sequence[bytes]) -> list[bytes]:
    """The columns of keys: lengths of the prefixes shared with the key before, and the rest."""
    shared = _shared_with_before(keys)
    rest = [keys[0], *(key[length:] for key, length in zip(keys[1:], shared, strict=True))]
    return [_varints(shared), _varints([*map(len, rest)]), b"".join(rest)]


def _shared_with_before(keys: Sequence[bytes]) -> list[int]:
    lengths = np.array([*map(len, keys)])
    width = int(lengths.max())
    if not 0 < width <= _MOST_COMPARED_AT_ONCE:
        return [_common_prefix(one, other) for one, other in pairwise(keys)]
    letters = np.array(keys, f"S{width}").view(np.uint8).reshape(-1, width)
    differ = np.ones((len(keys) - 1, width + 1), bool)  # if nowhere before, then past the end
    np.not_equal(letters[1:], letters[:-1], out=differ[:, :-1])
    same = differ.argmax(axis=1)
    shared: list[int] = np.minimum(same, np.minimum(lengths[1:], lengths[:-1])).tolist()
    return shared


def _common_prefix(one: bytes, other: bytes) -> int:
    """Length of what two keys of any length begin with."""
    size = min(len(one), len(other))
    differing = int.from_bytes(one[:size], "big") ^ int.from_bytes(other[:size], "big")
    return size - (differing.bit_length() + 7) // 8


def _file_table(files: set[str]) -> tuple[bytes, dict[str, int]]:
    """Encodes a table of files; returns each file's number in it, too."""
    paths = sorted(file.encode() for file in files)
    if not paths:
        return _varints([0]), {}
    shared, lengths, suffixes = _keys(paths)
    bases = bytes(len(paths))  # no part of a path carries over to the files of child nodes
    table = b"".join((_varints([len(paths)]), shared, lengths, bases, suffixes))
    return table, {path.decode(): number for number, path in enumerate(paths)}


def _statistics(nodes: Sequence[_Node]) -> list[bytes]:
    return [
        _varints([node.keys for node in nodes]),
        _varints([node.tree_bytes for node in nodes]),
        _varints([node.referred_bytes for node in nodes]),
    ]


def _encode_manifest(root: _Node, height: int, uuid: bytes, commit_ns: int) -> bytes:
    table, _ = _file_table({root.file})
    kind = compression = file_number = version_nodes = 0
    body = [
        uuid,
        _varints([kind, _MAX_INLINE_BYTES, _MAX_NODE_BYTES]),
        bytes((_VERSION_TREE_ARITY_LOG2, compression)),
        table,
        # One version: their number, its generation, its height, where its root is.
        _varints([1, 1, height, file_number, root.offset, root.length]),
        *_statistics([root]),
        _LENGTH.pack(commit_ns),
        _varints([version_nodes]),
    ]
    return _enclosed(_MANIFEST_MAGIC, body)


def _enclosed(magic: int, body: Sequence[bytes]) -> bytes:
    """Puts header and checksum around what a node, or the manifest, holds."""
    length = _OVERHEAD + sum(map(len, body))
    head = _HEADER.pack(magic) + _LENGTH.pack(length) + _UNVERSIONED_UNCOMPRESSED
    whole = b"".join((head, *body))
    return whole + _CHECKSUM.pack(google_crc32c.value(whole))


def _varints(numbers: Sequence[int]) -> bytes:
    """Encodes a column of unsigned LEB128 integers."""
    if not numbers or max(numbers) < 0x80:  # noqa: PLR2004 - what fits into one byte
        return bytes(numbers)
    return b"".join(map(_varint, numbers))


@lru_cache(maxsize=4096)  # most values are of one of a few sizes
def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:  # noqa: PLR2004
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
