"""Tables of contents with the right digest that no version of this package would write.

A defect, another version, or an attacker may write them: each name below says what is
wrong, or strange, and each entry is the rows of leaves of a table, or other fields of it.
"""

from __future__ import annotations

import json
import math
from typing import Any

from flax_partial.format.digests import digest
from flax_partial.format.model import numpy_dtype
from flax_partial.format.tables import FORMAT_VERSION

_HUGE = 10**15
Row = dict[str, Any]


def array(shape: list[int], chunk: list[int], digests: Any = None, **fields: Any) -> Row:
    """A row of an array; by default one whole box without digests, and of bytes."""
    count = 1
    for size, step in zip(shape, chunk, strict=False):
        count *= -(-size // max(step, 1))
    if digests is None:
        digests = [""] * count if count < 10 else []
    boxes = [([0] * len(shape), shape, digests)]
    own = {"dtype": "uint8", "shape": shape, "chunk": chunk, "boxes": boxes}
    return empty("np.ndarray", **own) | fields


def text(path: list[str], keys: str, **fields: Any) -> Row:
    """A row of a string."""
    return {"path": path, "keys": keys, "kind": "string", "text": "x"} | fields


def empty(kind: str, **fields: Any) -> Row:
    """A row of an empty container."""
    return {"path": ["a"], "keys": "d", "kind": kind} | fields


ROWS: dict[str, list[Row]] = {
    "one chunk of a petabyte": [array([_HUGE], [_HUGE])],
    "one chunk of a petabyte, with a digest": [array([_HUGE], [_HUGE], ["0" * 32])],
    "a petabyte of chunks": [array([_HUGE], [1])],
    "a petabyte of larger chunks": [array([_HUGE], [10**6])],
    "a terabyte, compressed": [array([10**12], [10**12], compression="zstd")],
    "a petabyte, compressed": [array([_HUGE], [_HUGE], compression="zstd")],
    "more than is there": [array([4 << 30], [4 << 30])],
    "more than is there, in parts": [array([4 << 30], [1 << 30])],
    "chunk larger than the array": [array([10], [_HUGE])],
    "chunk larger than the array, compressed": [array([10], [_HUGE], compression="zstd")],
    "longer than any integer": [array([10**30], [10**30])],
    "empty, and longer than any integer": [array([0, 10**30], [1, 1])],
    "empty, and long": [array([0, 2**62], [1, 1])],
    "size beyond 64 bits": [array([2**40, 2**40], [2**40, 2**40])],
    "33 axes": [array([1] * 33, [1] * 33)],
    "100 axes": [array([1] * 100, [1] * 100)],
    "chunk of another rank": [array([3], [3, 3])],
    "chunk of another rank, no box": [array([3], [3, 3], boxes=[])],
    "chunk of nothing": [array([3], [0])],
    "chunk of nothing, no box": [array([3], [0], boxes=[])],
    "run beyond the file": [array([3000], [3000], runs=[[0, 10**15, 1]])],
    "run in a part that is not there": [array([3000], [3000], runs=[[9, 0, 1]])],
    "runs of too many chunks": [array([3000], [3000], runs=[[0, 0, 10**15]])],
    "run of no chunks": [array([3000], [3000], runs=[[0, 0, 0], [0, 0, 1]])],
    "runs of compressed chunks": [array([3000], [3000], runs=[[0, 0, 1]], compression="zstd")],
    "data of no bytes": [text(["a"], "d", data="????")],
    "placeholder of a string": [text(["a"], "d", placeholder=True)],
    "placeholder, and what is in it": [empty("list", placeholder=True), text(["a", "b"], "dd")],
    "places of other sizes": [array([3], [3], boxes=[([0], [3], [""], ["AAAA"] * 2)])],
    "places in a file": [array([3], [3], boxes=[([0], [3], [""], [[0, 3]])])],
    "runs of no array": [text(["a"], "d", runs=[[0, 0, 1]])],
    "one run in a thousand leaves": [
        array([30_000], [30_000], runs=[[0, 0, 1]], path=[f"a{number}"]) for number in range(1000)
    ],
    "data file that is not there": [array([3000], [3000], file=7)],
    "data file beyond any count": [array([3000], [3000], file=10**19)],
    "negative data file": [array([3000], [3000], file=-1)],
    "data file as text": [array([3000], [3000], file="../../data")],
    "data file of no array": [text(["a"], "d", file=3)],
    "the same box twice": [array([2], [1], boxes=[([0], [1], [""]), ([0], [1], [""])])],
    "10,000 nested keys": [text(["k"] * 10_000, "d" * 10_000)],
    "10,000 nested indices": [text(["0"] * 10_000, "s" * 10_000)],
    "last of 10^15 elements": [text(["list", str(_HUGE)], "ds")],
    "last of two elements": [text(["list", "1"], "ds")],
    "word as an index": [text(["list", "x"], "ds")],
    "negative index": [text(["list", "-1"], "ds")],
    "padded index": [text(["list", "00"], "ds")],
    "word as an integer key": [text(["x"], "i")],
    "integer key beyond text": [text(["9" * 6000], "i")],
    "one integer, two spellings": [text(["1"], "i"), text(["01"], "i")],
    "lone surrogate in a key": [text(["\ud800"], "d")],
    "lone surrogate in a text": [text(["a"], "d", text="\ud800")],
    "lone surrogate in the name of an array": [array([3], [3], path=["\ud800"])],
    "leaf, then what is inside of it": [text(["a"], "d"), text(["a", "b"], "dd")],
    "subtree, then a leaf in its place": [text(["a", "b"], "dd"), text(["a"], "d")],
    "empty dict, then what is inside of it": [empty("dict"), text(["a", "b"], "dd")],
    "one leaf twice": [text(["a"], "d"), text(["a"], "d", text="y")],
    "list and dict in one": [text(["a", "b"], "dd"), text(["a", "0"], "ds")],
    "the root as a leaf": [text([], "")],
    "the root as a leaf, and another": [text([], ""), text(["a"], "d")],
    "number with axes": [array([3], [3], kind="scalar")],
    "NumPy scalar with axes": [array([3], [3], kind="np.generic")],
    "PRNG key of bytes": [array([3], [3], kind="prng_key", text="threefry2x32")],
    "PRNG key of an unknown kind": [array([2], [2], kind="prng_key", dtype="uint32", text="x")],
    "PRNG key of another size": [array([3], [3], kind="prng_key", dtype="uint32", text="rbg")],
    "array that JAX does not have": [array([3], [3], kind="jax.Array", dtype="int64")],
    "sharding that is not there": [array([2], [2], sharding=7)],
    "one long sharding of a thousand leaves": [
        array([2], [2], path=[str(i)], kind="jax.Array", sharding=0) for i in range(1000)
    ],
    "no leaves": [],
}
FIELDS: dict[str, dict[str, Any]] = {
    "deep metadata": {"custom_metadata": json.loads('{"a":' * 900 + "1" + "}" * 900)},
    "times beyond any clock": {"started_ns": 10**400, "committed_ns": 10**400},
    "format of tomorrow": {"format": FORMAT_VERSION + 1},
    "format as text": {"format": str(FORMAT_VERSION)},
    "format as truth": {"format": True},
    "feature of tomorrow": {"requires": ["tomorrow"]},
    "features as text": {"requires": "tomorrow"},
    "metadata as a list": {"custom_metadata": [1]},
    "training as a list": {"training": [1]},
    "shardings that are none": {"shardings": ["x", 3]},
    "shardings as a dict": {"shardings": {"0": 1}},
    "one long sharding of a thousand leaves": {"shardings": [{"a": "x" * (1 << 17)}]},
    "lone surrogate in a sharding": {"shardings": [{"a": "\ud800"}]},
    "negative count": {"parts": -1, "bytes": -1},
    "data files elsewhere": {"data_parts": ["part/../../../x"]},
    "data file of an odd name": {"data_parts": ["part/data.01"]},
    "leaves as a number": {"leaves": 3},
    "leaves that are no rows": {"leaves": [3, "x", [1]]},
}
_ONE = [text(["a"], "d"), array([2], [2], path=["b"], sharding=0)]
# Text that is taken for JSON, and ends in whatever reads it.
BOMBS: dict[str, bytes] = {
    "brackets, 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "objects, 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "unclosed": b"[" * 100_000,
    "number of 100,000 digits": b"9" * 100_000,
    "100,000 empty lists": b"[" + b"[]," * 100_000 + b"1]",
}
NAMES = tuple(dict.fromkeys((*ROWS, *FIELDS, *BOMBS)))


def contents_head(part: str) -> dict[str, Any]:
    """What else a table of contents has, of a checkpoint that was made of one part."""
    return {
        "started_ns": 1,
        "committed_ns": 2,
        "parts": 1,
        "first_part": part,
        "data_parts": [part],
    }


def part_head(part: str) -> dict[str, Any]:
    """What else the table of a part has."""
    return {"process": 0, "time_ns": int(part.split(".")[1]), "bytes": 0}


def table(name: str, head: dict[str, Any]) -> bytes:
    """A table of contents with everything that its kind has (`head`), and what `name` says."""
    bomb = BOMBS.get(name)
    if bomb is not None:
        return envelope(_text(_ONE, head | {"leaves": "BOMB"}).replace(b'"BOMB"', bomb))
    return table_of(ROWS.get(name, _ONE), head | FIELDS.get(name, {}))


def table_of(rows: list[Row], head: dict[str, Any]) -> bytes:
    """A table of contents with the given rows; `head` may replace any of its other fields."""
    return envelope(_text(rows, head))


def _text(rows: list[Row], head: dict[str, Any]) -> bytes:
    fields = {"format": FORMAT_VERSION, "custom_metadata": {}, "shardings": [{}]}
    leaves = [_placed(row) for row in rows] if "process" in head else rows
    return json.dumps({**fields, "leaves": leaves} | head).encode()


def _placed(row: Row) -> Row:
    """The row in a part: each chunk has a place in the part's data file."""
    if "boxes" not in row:
        return row
    place = [0, math.prod(row["chunk"]) * numpy_dtype(row["dtype"]).itemsize]
    boxes = [(*box, [place] * len(box[2]))[:4] for box in row["boxes"]]
    return row | {"boxes": boxes}


def envelope(body: bytes) -> bytes:
    """A table's text in a file that has its digest."""
    return b'{"xxh3_128":"' + digest(body).encode() + b'","table":' + body + b"}\n"
