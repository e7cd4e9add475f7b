"""What Orbax wrote is read: by any of its savers, in any of its layouts, damaged or not.

What a table here leaves out is what Orbax itself cannot save: arrays without elements, NumPy
scalars, complex numbers, and in v0's StandardCheckpointer strings.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
import trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint.experimental import v1
from orbax_side import STATES as SHARED
from orbax_side import (
    abstract,
    as_nested,
    assert_same,
    edit,
    has_strings,
    map_leaves,
    on_device,
    sharded,
)

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUICK = fp.SaveOptions(durable=False)

pytestmark = pytest.mark.usefixtures("wide_types")

# --- who writes it; each returns what to load


def write_v1(path: Path, state: Any) -> Path:
    v1.save(path, state)
    return path


def write_v1_partial(path: Path, state: Any) -> Path:
    for key, value in state.items():
        v1.partial.save(path, {key: value})
    v1.partial.finalize(path)
    return path


def write_v1_checkpointables(path: Path, state: Any) -> Path:
    v1.save_checkpointables(path, {"anything": state})
    return path


def write_v0_standard(path: Path, state: Any) -> Path:
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    return path


def pytree_writer(*, ocdbt: bool, zarr3: bool) -> Callable[[Path, Any], Path]:
    def write(path: Path, state: Any) -> Path:
        handler = v0.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
        with v0.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=v0.args.PyTreeSave(state))
        return path

    return write


def manager_writer(item: Any, **more: Any) -> Callable[[Path, Any], Path]:
    def write(path: Path, state: Any) -> Path:
        with v0.CheckpointManager(path) as manager:
            manager.save(4, args=item(state), **more)
            manager.wait_until_finished()
        found = fp.latest(path)
        assert found == path / "4"
        return found

    return write


def named_item(state: Any) -> Any:
    return v0.args.Composite(state=v0.args.PyTreeSave(state))


write_plain = pytree_writer(ocdbt=False, zarr3=False)
WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "v1": write_v1,
    "v1-partial": write_v1_partial,
    "v1-checkpointables": write_v1_checkpointables,
    "v0-standard": write_v0_standard,
    "v0-ocdbt-zarr2": pytree_writer(ocdbt=True, zarr3=False),
    "v0-ocdbt-zarr3": pytree_writer(ocdbt=True, zarr3=True),
    "v0-plain-zarr2": write_plain,
    "v0-plain-zarr3": pytree_writer(ocdbt=False, zarr3=True),
    "v0-manager": manager_writer(v0.args.StandardSave),
    "v0-manager-pytree": manager_writer(v0.args.PyTreeSave, metrics={"loss": 0.5}),
    "v0-manager-named": manager_writer(named_item),
}
NO_STRINGS = (WRITERS["v0-standard"], WRITERS["v0-manager"])


# --- what is written


def shardings() -> Any:
    return {
        "last": on_device(7),
        "rows": sharded("x", "x"),
        "both": sharded("xy", "x", "y"),
        "columns": sharded("xy", None, "y"),
        "two axes": sharded("xyz", ("x", "z"), "y"),
        "replicated": sharded("xy"),
    }


STATES: dict[str, Callable[[], Any]] = {
    **SHARED,
    "shardings": shardings,
    "key": lambda: jax.random.key(3),
    "scalars": lambda: [0, -5, 2**63 - 1, 2**64 - 1, True, 2.5, float("-inf"), float("nan")],
    "empties": lambda: {"a": {}, "b": [], "c": (), "d": None, "e": [None, [[]]]},
    "odd-names": lambda: {"a b": 1, "ü": np.ones(1), "c": {"0": 2}, "~": 3, "zarr.json": 4},
    "lists": lambda: [[np.full(2, i) for i in range(12)], (1, ({"a": (2,)},))],
    "strings": lambda: {"a": "text", "b": "", "c": {"d/e": "ü\n", "f~0": "x"}, "g": ["1"]},
}


# --- all states, by all writers


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_orbax_wrote_is_read(writer: Any, make: Any, tmp_path: Path) -> None:
    state = {"x": make(), "other": jnp.arange(2)}
    if writer in NO_STRINGS and has_strings(state):
        pytest.skip("StandardCheckpointer saves no strings")
    path = writer(tmp_path / "checkpoint", state)
    assert_same(fp.load(path), map_leaves(on_default_device, as_nested(state)))
    assert_same(fp.load(path, target=map_leaves(abstract, state)), state)
    assert fp.verify(path) == fp.VerifyReport(
        path, len(trees.flat(state)[0]), fp.metadata(path).bytes, {}
    )


def on_default_device(leaf: Any) -> Any:
    return jax.device_put(leaf, jax.devices()[0]) if isinstance(leaf, jax.Array) else leaf


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
@pytest.mark.parametrize("writer", [write_v1, write_plain], ids=["v1", "v0-plain"])
def test_its_metadata_is_what_ours_would_be(writer: Any, make: Any, tmp_path: Path) -> None:
    state = {"x": make(), "other": jnp.arange(2)}
    fp.save(tmp_path / "ours", state, options=QUICK)
    ours = {
        name: replace(leaf, kind="None") if leaf.kind == "namedtuple" else leaf
        for name, leaf in fp.finalize(tmp_path / "ours").leaves.items()
    }
    theirs = fp.metadata(writer(tmp_path / "orbax", state)).leaves
    assert {name: on_first_device(leaf) for name, leaf in theirs.items()} == ours


def on_first_device(leaf: fp.LeafMetadata) -> fp.LeafMetadata:
    """What lies on one device is said to lie on the first, which every reader has."""
    if leaf.sharding is None or leaf.sharding["sharding_type"] != "SingleDeviceSharding":
        return leaf
    return replace(leaf, sharding={**leaf.sharding, "device_str": str(jax.devices()[0])})


def test_custom_metadata_and_times_are_read(tmp_path: Path) -> None:
    before = time.time()
    v1.save(tmp_path / "v1", {"a": 1}, custom_metadata={"run": {"lr": 0.1}})
    found = fp.metadata(tmp_path / "v1")
    assert found.custom_metadata == {"run": {"lr": 0.1}}
    assert before <= found.started_at <= found.committed_at <= time.time()
    assert (found.path, found.parts, found.bytes) == (tmp_path / "v1", 0, 8)


def test_metadata_of_a_step_and_of_its_tree_are_merged(tmp_path: Path) -> None:
    tree = v0.args.PyTreeSave({"a": 1}, custom_metadata={"tree": 1, "both": "tree"})
    with v0.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=tree, custom_metadata={"step": 2, "both": "step"})
        manager.wait_until_finished()
    expected = {"tree": 1, "step": 2, "both": "step"}
    assert fp.metadata(tmp_path / "0").custom_metadata == expected


def test_a_tree_that_is_one_leaf_is_read(tmp_path: Path) -> None:
    v1.save(tmp_path / "leaf", jnp.arange(5))
    assert_same(fp.load(tmp_path / "leaf"), jnp.arange(5))
    assert list(fp.metadata(tmp_path / "leaf").leaves) == [""]


@pytest.mark.parametrize("writer", ["v1", "v0-manager", "v0-standard"])
def test_a_checkpoint_without_metadata_of_its_own_is_read(writer: str, tmp_path: Path) -> None:
    path = WRITERS[writer](tmp_path / "checkpoint", {"a": np.ones(2)})
    (path / "_CHECKPOINT_METADATA").unlink()
    assert_same(fp.load(path), {"a": np.ones(2)})
    described = fp.metadata(path)
    assert described.custom_metadata == {}
    assert 0 <= time.time() - described.committed_at < 60


def test_an_item_without_leaves_is_an_empty_dict(checkpoint: Path) -> None:
    edit(checkpoint / "_METADATA", lambda table: table["tree_metadata"].clear())
    assert fp.load(checkpoint) == {}


def test_ours_is_read_as_an_item_too(tmp_path: Path) -> None:
    state = {"a": jnp.ones(3), "b": ["text", 1]}
    fp.save(tmp_path / "ours", state, options=QUICK)
    fp.finalize(tmp_path / "ours")
    assert_same(fp.load(tmp_path / "ours" / "state"), state)


def test_target_on_other_devices_and_of_other_dtype(tmp_path: Path) -> None:
    path = write_v1(tmp_path / "v1", {"a": sharded("xy", "x", "y"), "b": np.arange(3)})
    want = {"a": sharded("xyz", "z", ("y", "x")), "b": np.arange(3.0)}
    target = map_leaves(abstract, want)
    with pytest.raises(fp.TargetMismatchError, match="'b'"):
        fp.load(path, target)
    assert_same(fp.load(path, target, cast=True), want)


# --- what is no checkpoint


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_plain(tmp_path / "runs" / "one", {"a": 1})
    write_plain(tmp_path / "runs" / "unfinished.orbax-checkpoint-tmp", {"a": 1})
    for name in ("nothing", "empty", "file", "runs", "runs/unfinished.orbax-checkpoint-tmp"):
        with pytest.raises(fp.NoSessionError, match=name):
            fp.load(tmp_path / name)
        with pytest.raises(fp.NoSessionError, match=name):
            fp.metadata(tmp_path / name)


def test_a_step_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    with v0.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=v0.args.StandardSave({"a": np.ones(2)}))
        manager.wait_until_finished()
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "1" / "default", tmp_path / "3" / "default.orbax-checkpoint-tmp")
    shutil.copy(tmp_path / "1" / "_CHECKPOINT_METADATA", tmp_path / "3")
    assert fp.steps(tmp_path) == [1]


# --- damage

LEAVES: dict[str, Any] = {"w": np.arange(6.0), "s": "text", "l": [1, 2.5]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on plain files, so that each can be damaged."""
    leaves = LEAVES | {"j": jnp.ones(2), "k": jax.random.key(0)}
    return write_plain(tmp_path_factory.mktemp("orbax") / "original", leaves)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def leaf(table: Any, name: str = "w") -> Any:
    return table["tree_metadata"][f"('{name}',)"]


def key(table: Any, value: Any) -> None:
    leaf(table)["key_metadata"][0].update(value)


def again(table: Any, name: str, keys: list[tuple[str, int]]) -> None:
    """Adds the leaf `w` once more, under other keys."""
    path = [{"key": text, "key_type": kind} for text, kind in keys]
    table["tree_metadata"][name] = leaf(table) | {"key_metadata": path}


TREE, STRINGS, SHARDING = "_METADATA", "_strings.json", "_sharding"
PROCESS = "array_metadatas/process_0"
EDITS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "no-tree": (TREE, lambda t: t.pop("tree_metadata"), "tree_metadata"),
    "tree-is-a-list": (TREE, lambda t: t.update(tree_metadata=[]), "list"),
    "leaf-without-keys": (TREE, lambda t: leaf(t).pop("key_metadata"), "key_metadata"),
    "leaf-without-type": (TREE, lambda t: leaf(t).pop("value_metadata"), "value_metadata"),
    "key-is-a-number": (TREE, lambda t: key(t, {"key": 3}), "int"),
    "key-is-half-a-character": (TREE, lambda t: key(t, {"key": "\ud800"}), "surrogate"),
    "unknown-kind-of-key": (TREE, lambda t: key(t, {"key_type": 9}), "9"),
    "index-is-text": (TREE, lambda t: key(t, {"key_type": 1}), "'w'"),
    "index-is-negative": (TREE, lambda t: again(t, "x", [("n", 2), ("-1", 1)]), "'-1'"),
    "index-is-padded": (TREE, lambda t: again(t, "x", [("n", 2), ("00", 1)]), "'00'"),
    "list-with-a-gap": (TREE, lambda t: again(t, "x", [("l", 2), ("7", 1)]), "lacks"),
    "leaf-is-a-subtree": (TREE, lambda t: again(t, "x", [("w", 2), ("in", 2)]), "'w'"),
    "two-leaves-of-one-name": (TREE, lambda t: again(t, "x", [("w", 2)]), "'w' is there twice"),
    "array-that-is-not-there": (TREE, lambda t: again(t, "x", [("v", 2)]), "'v'"),
    "scalar-is-an-array": (
        TREE,
        lambda t: leaf(t)["value_metadata"].update(value_type="scalar"),
        "'w'",
    ),
    "name-leads-outside": (TREE, lambda t: key(t, {"key": "../w"}), "outside"),
    "name-is-absolute": (TREE, lambda t: key(t, {"key": "/w"}), "outside"),
    "no-database": (TREE, lambda t: t.update(use_ocdbt=True), "manifest.ocdbt is missing"),
    "other-zarr": (TREE, lambda t: t.update(use_zarr3=True), "cannot be opened"),
    "string-is-not-there": (STRINGS, lambda t: t.pop("s"), "'s'"),
    "string-is-a-number": (STRINGS, lambda t: t.update(s=1), "'s'"),
    "sharding-is-no-json": (SHARDING, lambda t: t.update({"ag==": "{"}), "JSON"),
    "sharding-is-a-list": (SHARDING, lambda t: t.update({"ag==": "[]"}), "'j'"),
    "process-tells-no-list": (PROCESS, lambda t: t.update(array_metadatas=3), "int"),
    "process-tells-no-name": (
        PROCESS,
        lambda t: [one["array_metadata"].pop("param_name") for one in t["array_metadatas"]],
        "param_name",
    ),
}


@pytest.mark.parametrize(("file", "change", "words"), EDITS.values(), ids=EDITS)
def test_a_table_that_makes_no_sense_is_corrupt(
    file: str, change: Any, words: str, checkpoint: Path
) -> None:
    edit(checkpoint / file, change)
    for read in (fp.load, fp.metadata):
        with pytest.raises(fp.CorruptCheckpointError, match=words):
            read(checkpoint)
    assert not fp.verify(checkpoint).ok


@pytest.mark.parametrize("file", [TREE, STRINGS, SHARDING, PROCESS, "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(
    file: str, content: bytes, checkpoint: Path
) -> None:
    (checkpoint / file).write_bytes(content)
    with pytest.raises(fp.CorruptCheckpointError, match=file):
        fp.load(checkpoint)


@pytest.mark.parametrize("file", ["w/.zarray", "w/0"])
def test_an_array_with_a_damaged_file_is_named(file: str, checkpoint: Path) -> None:
    whole = (checkpoint / file).read_bytes()
    for content in (b"", whole[:-3], b"{}", None):
        (checkpoint / file).unlink(missing_ok=True)
        if content is not None:
            (checkpoint / file).write_bytes(content)
        with pytest.raises(fp.CorruptCheckpointError, match="'w'"):
            fp.load(checkpoint)
        assert not fp.verify(checkpoint).ok


def test_a_chunk_left_out_means_zeros_only_where_orbax_says_so(checkpoint: Path) -> None:
    (checkpoint / "w" / "0").unlink()
    with pytest.raises(fp.CorruptCheckpointError, match="'w'"):
        fp.load(checkpoint)
    edit(checkpoint / TREE, lambda t: t.update(store_array_data_equal_to_fill_value=False))
    assert_same(fp.load(checkpoint)["w"], np.zeros(6))


def test_a_damaged_database_is_corrupt(tmp_path: Path) -> None:
    path = write_v1(tmp_path / "v1", LEAVES)
    manifest = path / "state" / "manifest.ocdbt"
    for content in (b"", b"x" * 100, manifest.read_bytes()[:-5]):
        manifest.write_bytes(content)
        with pytest.raises(fp.CorruptCheckpointError, match="'w'"):
            fp.load(path)
    manifest.unlink()
    with pytest.raises(fp.CorruptCheckpointError, match="manifest"):
        fp.load(path)


@pytest.mark.parametrize(
    "sizes",
    [{"shape": [2**50]}, {"shape": [2**62]}, {"chunks": [2**50]}],
    ids=["array", "array-past-counting", "chunk"],
)
def test_an_absurd_size_is_corrupt_and_ends_no_process(sizes: Any, checkpoint: Path) -> None:
    edit(checkpoint / "w" / ".zarray", lambda table: table.update(sizes))
    with pytest.raises(fp.CorruptCheckpointError, match="'w'"):
        fp.load(checkpoint)
    assert list(fp.verify(checkpoint).bad) == ["w"]


def test_a_key_that_jax_does_not_know_is_said_so(checkpoint: Path) -> None:
    def roll(table: Any) -> None:
        for one in table["array_metadatas"]:
            if one["array_metadata"]["param_name"] == "k":
                one["array_metadata"]["ext_metadata"]["random_key_impl"] = "dice"

    edit(checkpoint / PROCESS, roll)
    assert fp.metadata(checkpoint).leaves["k"].dtype == "key<dice>"
    for sharding in ("default", "saved"):
        with pytest.raises(fp.TargetMismatchError, match="'k' is no PRNG key that JAX knows"):
            fp.load(checkpoint, sharding=sharding)


FOREIGN: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "dtype": ("w/.zarray", lambda t: t.update(dtype="|S8"), "'w' is an array of"),
    "type": (
        TREE,
        lambda t: leaf(t)["value_metadata"].update(value_type="my.Type"),
        r"'w' is of type 'my\.Type'",
    ),
    "msgpack": (
        TREE,
        lambda t: leaf(t)["value_metadata"].update(skip_deserialize=True),
        "'w' is in a file of msgpack",
    ),
}


@pytest.mark.parametrize(("file", "change", "words"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_read_is_said_so(file: str, change: Any, words: str, checkpoint: Path) -> None:
    edit(checkpoint / file, change)
    for read in (fp.load, fp.metadata):
        with pytest.raises(fp.UnsupportedLeafError, match=words):
            read(checkpoint)


def places(node: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield where
    inner = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for at, child in inner:
        yield from places(child, (*where, at))


def put(node: Any, where: tuple[Any, ...], value: Any) -> Any:
    if not where:
        return value
    node[where[0]] = put(node[where[0]], where[1:], value)
    return node


anything = st.sampled_from([None, True, -1, 2**70, 0.5, "", "w", "\ud800", [], ["w"], {}, {"a": 1}])


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step with an item of each kind."""
    path = tmp_path_factory.mktemp("composite")
    with v0.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(path / "plain", {"a": np.arange(3.0)})
    items = v0.args.Composite(
        tree=v0.args.PyTreeSave({"w": np.arange(2), "s": "text"}),
        array=v0.args.ArraySave(jnp.arange(2)),
        key=v0.args.JaxRandomKeySave(jax.random.key(0)),
        json=v0.args.JsonSave({"a": [1, {"b": None}]}),
    )
    with v0.CheckpointManager(path) as manager:
        manager.save(1, args=items)
    return Path(shutil.move(path / "plain", path / "1" / "plain")).parent


KEY = "key/jax_random_key"
TABLES: dict[str, list[str]] = {
    "original": [TREE, STRINGS, SHARDING, PROCESS, "_CHECKPOINT_METADATA"],
    "composite": [
        "_CHECKPOINT_METADATA",
        "json/metadata",
        f"array/{TREE}",
        f"{KEY}/{TREE}",
        f"{KEY}_metadata/metadata",
        f"array/{SHARDING}",
        f"array/{PROCESS}",
        "plain/a/.zarray",
    ],
}


@pytest.mark.parametrize("written", TABLES)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_table_makes_anything_else_fail(
    written: str, request: pytest.FixtureRequest, data: Any
) -> None:
    """Any value anywhere in its tables: a checkpoint is read, or one of our errors says why not."""
    path = request.getfixturevalue(written)
    name = data.draw(st.sampled_from(TABLES[written]))
    whole = (path / name).read_bytes()
    table = json.loads(whole)
    where = data.draw(st.sampled_from(list(places(table))))
    try:
        (path / name).write_text(json.dumps(put(table, where, data.draw(anything))))
        for read in (fp.metadata, fp.load, fp.verify, partial(fp.load, sharding="saved")):
            with contextlib.suppress(fp.PartialCheckpointError):
                read(path)
        assert fp.steps(path.parent) in ([], [1])
    finally:
        (path / name).write_bytes(whole)
