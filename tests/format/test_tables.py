"""Tables of contents: what is written is read, and what is read is trusted in nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st

from flax_partial.errors import CorruptCheckpointError
from flax_partial.format.digests import digest
from flax_partial.format.keypaths import KeyPath
from flax_partial.format.model import (
    NUMPY_ARRAY,
    PRNG_KEY,
    STRING,
    Box,
    Leaf,
    Part,
    Sharding,
    numpy_dtype,
)
from flax_partial.format.tables import decode_part, encode_part

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
_keys = st.one_of(
    st.tuples(_texts, st.sampled_from("da")),
    st.tuples(st.integers().map(str), st.just("i")),
    st.tuples(st.integers(0).map(str), st.just("s")),
)
_paths = st.lists(_keys, max_size=4).map(
    lambda keys: KeyPath(tuple(text for text, _ in keys), "".join(kind for _, kind in keys))
)


@st.composite
def leaves(draw: st.DrawFn) -> Leaf:
    path = draw(_paths)
    if draw(st.booleans()):
        text, generation = draw(_texts), draw(st.integers(0, 5))
        return Leaf(path.texts, path.key_kinds, STRING, text=text, generation=generation)
    counts = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    chunk = tuple(draw(st.integers(1, 4)) for _ in counts)
    shape = tuple(a * b for a, b in zip(counts, chunk, strict=True))
    kind = draw(st.sampled_from((NUMPY_ARRAY, PRNG_KEY)))
    dtype = "uint32" if kind == PRNG_KEY else draw(st.sampled_from(trees.DTYPES))
    size = math.prod(chunk) * numpy_dtype(dtype).itemsize
    places = st.one_of(
        st.tuples(st.integers(0, 2**60), st.just(size)), st.binary(min_size=size, max_size=size)
    )
    count = math.prod(counts)
    digests = ("0" * 32,) * count if draw(st.booleans()) else ()
    placed = tuple(draw(places) for _ in range(count))
    return Leaf(
        path.texts,
        path.key_kinds,
        kind,
        dtype=dtype,
        shape=shape,
        chunk=chunk,
        compression=draw(st.sampled_from((None, "zstd", "blosc"))),
        generation=draw(st.integers(0, 5)),
        sharding=draw(st.sampled_from((None, Sharding({"sharding_type": "SingleDeviceSharding"})))),
        text=draw(_texts),
        boxes=(Box((0,) * len(shape), shape, digests, placed),),
        file=draw(st.integers(0, 3)),
    )


parts = st.builds(
    Part,
    process=st.integers(0, 10_000),
    time_ns=st.integers(0, 2**63 - 1),
    custom_metadata=st.dictionaries(_texts, st.integers() | _texts, max_size=2),
    leaves=st.lists(leaves(), min_size=1, max_size=3).map(tuple),
    bytes=st.integers(0, 2**60),
    durable=st.booleans(),
    training=st.dictionaries(_texts, st.integers(), max_size=2),
)


@given(parts)
def test_part_is_read_as_it_was_written(part: Part) -> None:
    assert decode_part(encode_part(part), where="part.json") == part


@given(parts, st.data())
def test_any_changed_byte_and_any_torn_end_is_noticed(part: Part, data: st.DataObject) -> None:
    encoded = encode_part(part)
    position = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytes((encoded[position] ^ data.draw(st.integers(1, 255)),))
    for damaged in (encoded[:position] + changed + encoded[position + 1 :], encoded[:position]):
        with pytest.raises(CorruptCheckpointError, match=r"part\.json"):
            decode_part(damaged, where="part.json")


def enveloped(table: object) -> bytes:
    body = json.dumps(table).encode()
    return b'{"xxh3_128":"' + digest(body).encode() + b'","table":' + body + b"}\n"


ARRAY = Leaf(("w",), "d", NUMPY_ARRAY, dtype="int8", shape=(2,), chunk=(2,))
ARRAY.boxes = (Box((0,), (2,), ("0" * 32,), (b"xy",)),)
ARRAY.sharding = Sharding({"sharding_type": "SingleDeviceSharding"})
FORGED: dict[str, dict[str, Any]] = {
    "a sharding that is not there": {"sharding": 1},
    "a sharding before the first": {"sharding": -1},
    "a sharding that is no number": {"sharding": {}},
    "an array that gives way": {"placeholder": True},
    "no array, with the data of one": {"kind": "None"},
    "an array without a dtype": {"dtype": ""},
    "another dtype": {"dtype": "int16"},
    "a path without its keys": {"keys": ""},
    "an index that Python would not write": {"path": ["01"], "keys": "s"},
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_row_that_no_save_writes_is_refused(change: dict[str, Any]) -> None:
    table = json.loads(encode_part(Part(0, 1, {}, (ARRAY,), 2)))["table"]
    assert decode_part(enveloped(table), where="part.json").leaves == (ARRAY,)
    table["leaves"][0] |= change
    with pytest.raises(CorruptCheckpointError, match=r"part\.json"):
        decode_part(enveloped(table), where="part.json")


_anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(parts, st.data())
def test_table_with_a_right_digest_and_wrong_content_is_refused_or_read(
    part: Part, data: st.DataObject
) -> None:
    """Written by a defect, or by another program: no other exception, whatever it holds."""
    encoded = encode_part(part)
    table = json.loads(encoded)["table"]
    node: Any = table
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(_anything)
        break
    try:
        decode_part(enveloped(table), where="part.json")
    except CorruptCheckpointError as error:
        assert "part.json" in str(error)  # noqa: PT017 - being accepted is fine too
