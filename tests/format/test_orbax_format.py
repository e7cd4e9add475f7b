"""The derived files, held to tensorstore, which reads arrays, and to how Orbax looks things up."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
import tensorstore as ts
import trees

from flax_partial.format import orbax as orbax_format
from flax_partial.format.model import JAX_ARRAY, PRNG_KEY, STRING, Contents, Kind, Leaf, Sharding

SINGLE = {"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}


def files_of(*leaves: Leaf) -> dict[str, Any]:
    contents = Contents(1, 2, parts=1, custom_metadata={"ü": 1}, leaves=leaves)
    found = ((name, b"".join(pieces)) for name, pieces in orbax_format.root_files(contents))
    return {name: json.loads(content) for name, content in found if content}


def string(text: str, *keys: str) -> Leaf:
    return Leaf(keys, "d" * len(keys), STRING, text=text)


def array(*keys: str, key_kinds: str = "", kind: Kind = JAX_ARRAY, **fields: Any) -> Leaf:
    fields = {"dtype": "float32"} | fields
    return Leaf(keys, key_kinds or "d" * len(keys), kind, **fields)


@pytest.mark.parametrize("compression", [None, "zstd", "blosc"])
@pytest.mark.parametrize("dtype", trees.DTYPES)
def test_zarr_metadata_is_what_tensorstore_makes_of_it(dtype: str, compression: str | None) -> None:
    leaf = array("w", dtype=dtype, shape=(5, 3), chunk=(2, 3), compression=compression)
    metadata = orbax_format.zarr_metadata(leaf)
    context = ts.Context()
    database = ts.KvStore.open("memory://", context=context).result()
    database.write("w/zarr.json", metadata).result()
    spec = {"driver": "zarr3", "kvstore": "memory://w/"}
    store = ts.open(spec, open=True, context=context).result()
    assert store.spec().to_json()["metadata"] == json.loads(
        metadata
    )  # nothing was left to defaults
    data = trees.random_bits(dtype, (5, 3), 0)
    store.write(data).result()
    assert trees.fingerprint(store.read().result()) == trees.fingerprint(data)
    if compression is None:
        assert database.read("w/c/0/0").result().value == data[:2].tobytes()


def test_leaves_are_found_by_their_keys() -> None:
    leaf = array("a", "0", "5", key_kinds="dsi", dtype="int8", shape=(4,), chunk=(2,))
    leaf.sharding = Sharding(SINGLE)
    files = files_of(leaf)
    assert files["state/_METADATA"]["tree_metadata"] == {
        "('a', '0', '5')": {
            "key_metadata": [
                {"key": "a", "key_type": 2},
                {"key": "0", "key_type": 1},
                {"key": "5", "key_type": 2},
            ],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": [2],
            },
        }
    }
    name = base64.urlsafe_b64encode(b"a.0.5").decode()
    assert {key: json.loads(text) for key, text in files["state/_sharding"].items()} == {
        name: SINGLE
    }


def test_the_implementation_of_keys_is_told() -> None:
    key = array("k", kind=PRNG_KEY, dtype="uint32", shape=(2,), chunk=(2,), text="threefry2x32")
    (entry,) = files_of(key)["state/array_metadatas/process_0"]["array_metadatas"]
    assert entry["array_metadata"]["ext_metadata"] == {"random_key_impl": "threefry2x32"}


def test_strings_are_where_json_pointers_lead() -> None:
    found = files_of(string("1", "a.b"), string("2", "c/d"), string("3", ""), string("4", "e~1f"))
    assert found["state/_strings.json"] == {"a.b": "1", "c": {"d": "2"}, "": "3", "e/f": "4"}


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_string_within_another_is_not_found_rather_than_wrong(names: tuple[str, str]) -> None:
    found = files_of(*(string(name, name) for name in names))
    assert found["state/_strings.json"] == {"a": "a"}


def test_all_files_are_ascii() -> None:
    contents = Contents(1, 2, 1, {"ü": 1}, (string("ü", "ü"),))
    files = orbax_format.root_files(contents)
    assert all(piece.isascii() for _, pieces in files for piece in pieces)


def test_deriving_many_leaves_costs_little() -> None:
    """Linear: it takes a fifth of a second, and on no machine three."""
    shared = [Sharding(dict(SINGLE)) for _ in range(8)]
    leaves = tuple(
        array("layers", f"{i}", "w", shape=(i % 50, 64), chunk=(8, 64), sharding=shared[i % 8])
        for i in range(20_000)
    )
    start = time.process_time()
    files = files_of(*leaves)
    for leaf in leaves:
        orbax_format.zarr_metadata(leaf)
    assert time.process_time() - start < 3
    assert len(files["state/_METADATA"]["tree_metadata"]) == len(leaves)
