"""Targets in Orbax's terms, and loading to where it was saved from."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint.experimental import v1
from orbax_side import assert_same, on, on_device, sharded
from things import stored

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path


def state() -> dict[str, Any]:
    return {
        "x": sharded("xy", "x", "y"),
        "on": on_device(5),
        "numpy": np.arange(6).reshape(2, 3),
        "number": [1, 2.5],
        "text": "hi",
        "none": None,
        "empty": {},
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "1"
    v1.save(path, state())
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a process whose arrays lie on its first device, as its saves say."""
    return stored(tmp_path_factory.mktemp("ours") / "1", {**state(), "on": on_device(0)}).path


# --- what Orbax's metadata returns


def test_metadata_of_v1_is_a_target(theirs: Path) -> None:
    assert_same(fp.load(theirs, v1.metadata(theirs)), state())
    assert_same(fp.load(theirs, v1.metadata(theirs).metadata), state())
    assert_same(fp.load(theirs, v1.metadata(theirs)), v1.load(theirs, v1.metadata(theirs)))


def test_metadata_of_our_checkpoint_by_orbax_is_a_target(ours: Path) -> None:
    assert_same(fp.load(ours, v1.metadata(ours)), {**state(), "on": on_device(0)})


def test_metadata_of_v0_is_a_target(tmp_path: Path) -> None:
    want = state()
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "alone", want)
        described = checkpointer.metadata(tmp_path / "alone")
    assert_same(fp.load(tmp_path / "alone", described), want)
    assert_same(fp.load(tmp_path / "alone", described.item_metadata), want)
    assert_same(fp.load(tmp_path / "alone", described.item_metadata.tree), want)


def test_empty_named_tuple_that_orbax_restored_is_a_target(tmp_path: Path) -> None:
    class Empty(NamedTuple):
        __module__ = "orbax.checkpoint"

    empty = Empty()
    path = stored(tmp_path / "1", {"a": empty, "b": np.ones(2)}).path
    loaded = fp.load(path, {"a": empty, "b": np.zeros(2)})
    assert (loaded["a"], type(loaded["a"])) == (empty, Empty)


def test_metadata_of_a_managers_step_is_a_target(tmp_path: Path) -> None:
    items = {"state": state(), "config": {"a": 1}}
    with v0.CheckpointManager(tmp_path, item_names=("state", "config")) as manager:
        save = v0.args.Composite(
            state=v0.args.PyTreeSave(items["state"]), config=v0.args.JsonSave(items["config"])
        )
        manager.save(1, args=save)
        manager.wait_until_finished()
        described = manager.item_metadata(1)
    loaded = fp.load(tmp_path / "1", described, partial=True)
    assert_same(loaded["state"], items["state"])


def test_array_is_read_as_numpys_where_the_target_describes_one(theirs: Path) -> None:
    described = v1.metadata(theirs).metadata
    described["x"] = type(described["numpy"])((8, 16), np.dtype(np.float32), None)
    assert_same(fp.load(theirs, described)["x"], np.asarray(state()["x"]))


def test_target_for_devices_that_are_not_here_is_a_mismatch(theirs: Path) -> None:
    described = copy.deepcopy(v1.metadata(theirs).metadata)
    described["on"].sharding_metadata.device_str = "cpu:99"
    with pytest.raises(fp.TargetMismatchError, match="'on': its sharding in the target"):
        fp.load(theirs, described)


# --- types and placeholders


@pytest.mark.parametrize("of", ["theirs", "ours"])
def test_types_stand_for_values(of: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(of)
    target = {
        "number": [int, float],
        "text": str,
        "numpy": np.ndarray,
        "x": jax.ShapeDtypeStruct,
        "on": np.ndarray,
    }
    loaded = fp.load(path, target, partial=True)
    want = {name: state()[name] for name in target} | {
        "x": jax.device_put(np.asarray(state()["x"])),
        "on": np.arange(3, dtype=np.float32),
    }
    assert_same(loaded, want)


@pytest.mark.parametrize(
    ("target", "told"),
    [({"number": [str, float]}, "'number.0'"), ({"text": int}, "'text'"), ({"x": dict}, "'x'")],
)
def test_type_that_does_not_fit_is_a_mismatch(target: Any, told: str, ours: Path) -> None:
    with pytest.raises(fp.TargetMismatchError, match=told):
        fp.load(ours, target, partial=True)


@pytest.mark.parametrize("of", ["theirs", "ours"])
def test_placeholder_is_not_read_and_stays(of: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(of)
    target = {**dict.fromkeys(state(), ...), "numpy": state()["numpy"]}
    assert_same(fp.load(path, target)["numpy"], state()["numpy"])
    loaded = fp.load(path, target)
    assert all(loaded[name] is ... for name in state() if name != "numpy")
    with pytest.raises(
        fp.TargetMismatchError, match=r"\(1 leaf;(.|\n)*'text' is not in the target"
    ):
        fp.load(path, {name: one for name, one in target.items() if name != "text"})


# --- where arrays go without a target


def test_default_is_the_default_device_uncommitted(ours: Path) -> None:
    with jax.default_device(jax.devices()[3]):
        array = fp.load(ours)["x"]
    assert array.devices() == {jax.devices()[3]}
    assert not array.committed


def test_saved_sharding_is_made_again(theirs: Path) -> None:
    loaded = fp.load(theirs, sharding="saved")
    assert_same(loaded, state())
    assert loaded["x"].committed


def test_saved_sharding_of_ours_is_made_again(tmp_path: Path) -> None:
    want = {
        "two axes": sharded("xyz", ("x", "z"), "y"),
        "replicated": sharded("xy"),
        "key": jax.device_put(jax.random.split(jax.random.key(1), 8), on("xy", "y")),
        "numpy": np.ones(2),
    }
    path = stored(tmp_path / "c", want).path
    assert_same(fp.load(path, sharding="saved"), want)


def test_saved_sharding_is_for_what_the_target_says_nothing_of(ours: Path) -> None:
    struct = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    elsewhere = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=on("x", None, "x"))
    for target, want in ((struct, on("xy", "x", "y")), (elsewhere, elsewhere.sharding)):
        loaded = fp.load(ours, {"x": target}, partial=True, sharding="saved")
        assert loaded["x"].sharding == want
    assert fp.load(ours, {"x": struct}, partial=True)["x"].sharding != on("xy", "x", "y")


def test_unknown_choice_of_sharding_is_refused(ours: Path) -> None:
    with pytest.raises(ValueError, match="'default' or 'saved', not 'same'"):
        fp.load(ours, sharding="same")  # type: ignore[arg-type]


ON_ONE_DEVICE = """
import sys, numpy as np, flax_partial as fp

loaded = fp.load(sys.argv[1], {"on": ..., "x": ...}, partial=True, sharding="saved")
assert fp.load(sys.argv[1], {"on": np.ones(3, np.float32)}, partial=True, sharding="saved")
try:
    fp.load(sys.argv[1], sharding="saved")
except fp.TargetMismatchError as error:
    print(error)
"""


def test_saved_sharding_of_devices_that_are_not_here_is_a_mismatch(ours: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_DEVICE, ours],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert "'x' cannot be loaded as it was sharded" in done.stdout
    assert "saved from 8 devices" in done.stdout


SHARDINGS = {
    "other-kind": {"sharding_type": "PositionalSharding"},
    "without-a-kind": {},
    "mesh-of-another-size": {
        "sharding_type": "NamedSharding",
        "shape": [3],
        "axis_names": ["x"],
        "partition_spec": ["x"],
        "device_mesh": {"mesh": [{"id": 0}, {"id": 1}]},
    },
}


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
def test_sharding_that_cannot_be_made_is_told(sharding: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    v1.save(path, {"a": jnp.ones(2)})
    (path / "state" / "_sharding").write_text(json.dumps({"YQ==": json.dumps(sharding)}))
    with pytest.raises(fp.TargetMismatchError, match="'a' cannot be loaded as it was sharded"):
        fp.load(path, sharding="saved")
    fp.load(path)


def test_mesh_without_device_numbers_takes_the_first_devices(tmp_path: Path) -> None:
    """As Orbax wrote it before it kept them."""
    path = tmp_path / "c"
    v1.save(path, {"a": sharded("x", "x")})
    (text,) = json.loads((path / "state" / "_sharding").read_text()).values()
    old = {k: v for k, v in json.loads(text).items() if k not in ("device_mesh", "axis_types")}
    (path / "state" / "_sharding").write_text(json.dumps({"YQ==": json.dumps(old)}))
    assert_same(fp.load(path, sharding="saved"), {"a": sharded("x", "x")})


def test_options_go_together(ours: Path) -> None:
    target = {"x": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16), "more": 3, "on": ...}
    loaded = fp.load(ours, target, partial=True, keep_missing=True, cast=True, sharding="saved")
    assert (loaded["more"], loaded["on"]) == (3, ...)
    assert loaded["x"].dtype == jnp.bfloat16
    assert loaded["x"].sharding == on("xy", "x", "y")
