"""Reads a checkpoint, or a session, without flax_partial: by docs/format.md alone.

    python examples/second_reader.py runs/lm/40

It needs NumPy and xxhash, and checks every digest. An array whose dtype NumPy lacks, such as
bfloat16, comes as bytes, on one more axis. It reads no compressed chunks.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from itertools import product
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS = (2, 3)
PARTS = ("part.*", "p[0-9]*/part.*")
WITHOUT_DATA = {"None": None, "dict": {}, "list": [], "tuple": (), "namedtuple": ()}
HEAD, MIDDLE, END = b'{"xxh3_128":"', b'","table":', b"}\n"

Table = dict[str, Any]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Returns name -> array, string, bytes, None or empty container.

    Raises:
      ValueError: Something is not what was written, or not all of it is there.
    """
    files = [file for where in PARTS for file in path.glob(f"state/{where}/part.json")]
    parts = [(file.parent, read_table(file)) for file in files]
    parts.sort(key=lambda part: (part[1]["time_ns"], part[0].name))
    newest: dict[str, list[tuple[Path, Table]]] = {}
    for directory, table in parts:
        for leaf in table["leaves"]:
            held = newest.setdefault(".".join(leaf["path"]), [])
            if held and age(leaf) > age(held[0][1]):
                held.clear()
            if not held or age(leaf) == age(held[0][1]):
                held.append((directory, leaf))
    inner = {name for held in newest.values() for name in nodes_around(held[0][1])}
    return {
        name: put_together(name, held)
        for name, held in newest.items()
        if not (is_placeholder(held[0][1]) and tuple(held[0][1]["path"]) in inner)
    }


def read_table(file: Path) -> Table:
    """Reads a `part.json`, and checks its digest."""
    data = file.read_bytes()
    digest = data[len(HEAD) : len(HEAD) + 32]
    body = data[len(HEAD) + 32 + len(MIDDLE) : -len(END)]
    if data != HEAD + digest + MIDDLE + body + END or digest_of(body) != digest.decode():
        raise ValueError(f"{file} is damaged")
    table: Table = json.loads(body)
    if table["format"] not in FORMATS or table.get("requires"):
        raise ValueError(f"{file} is of format {table['format']}")
    return table


def age(leaf: Table) -> tuple[bool, int]:
    """How often a leaf had been replaced; a placeholder is older than any leaf."""
    return not is_placeholder(leaf), int(leaf.get("generation", 0))


def is_placeholder(leaf: Table) -> bool:
    """Whether a leaf gives way to others of its name, and inside of it."""
    return bool(leaf.get("placeholder", False))


def nodes_around(leaf: Table) -> list[tuple[str, ...]]:
    """The paths of the nodes in which a leaf lies; none for a placeholder."""
    path = () if is_placeholder(leaf) else tuple(leaf["path"])
    return [path[:depth] for depth in range(len(path))]


def put_together(name: str, held: list[tuple[Path, Table]]) -> Any:
    """Makes a leaf of the pieces that parts hold of it."""
    leaf = held[0][1]
    if leaf["kind"] == "string":
        return leaf.get("text", "")
    if leaf["kind"] == "bytes":
        return base64.b64decode(leaf.get("data", ""))
    if leaf["kind"] in WITHOUT_DATA:
        return WITHOUT_DATA[leaf["kind"]]
    if "compression" in leaf:
        raise ValueError(f"{name} is compressed")
    dtype, inner = stored_as(leaf["dtype"])
    shape, chunk_shape = leaf.get("shape", []), leaf.get("chunk", [])
    array = np.zeros((*shape, *inner), dtype)
    there = set()
    for directory, piece in held:
        for at, digest, place in chunks_of(piece):
            data = read_place(directory / data_file(piece), place)
            whole = np.frombuffer(data, dtype).reshape([*chunk_shape, *inner])
            index = tuple(map(slice, at, map(add, at, chunk_shape)))
            chunk = whole[tuple(map(slice, array[index].shape))]  # without what sticks out
            if digest and digest_of(chunk.tobytes()) != digest:
                raise ValueError(f"{name} is damaged in its chunk at {list(at)}")
            array[index] = chunk
            there.add(at)
    if len(there) != math.prod(map(chunk_count, shape, chunk_shape)):
        raise ValueError(f"{name} is not complete")
    return array


def stored_as(dtype: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype to read with, and the axes to add; bytes where NumPy has no such dtype."""
    if hasattr(np, dtype):
        return np.dtype(dtype).newbyteorder("<"), ()
    return np.dtype(np.uint8), (2 if dtype == "bfloat16" else 1,)


def chunks_of(leaf: Table) -> Iterator[tuple[tuple[int, ...], str, Any]]:
    """Yields the first index of each chunk, its digest and its place."""
    for start, shape, digests, *rest in leaf["boxes"]:
        places = rest[0] if rest else []
        chunk = leaf.get("chunk", [])
        steps = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
        for offset, digest, place in zip(product(*steps), digests, places, strict=True):
            yield tuple(map(add, start, offset)), digest, place


def chunk_count(size: int, step: int) -> int:
    """How many chunks an axis has."""
    return -(-size // step)


def data_file(leaf: Table) -> str:
    """In which file of its part a leaf has its chunks."""
    return f"data.{leaf['file']}" if "file" in leaf else "data"


def read_place(data_file: Path, place: Any) -> bytes:
    """Returns a chunk as it is stored."""
    if isinstance(place, str):
        return base64.b64decode(place)
    offset, length = place
    with data_file.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def digest_of(data: bytes) -> str:
    """The xxh3-128 of bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


if __name__ == "__main__":
    try:
        for leaf_name, value in read_checkpoint(Path(sys.argv[1])).items():
            is_array = isinstance(value, np.ndarray)
            print(leaf_name, f"{value.dtype}{list(value.shape)}" if is_array else repr(value))
    except ValueError as error:
        sys.exit(str(error))
