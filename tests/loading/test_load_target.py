"""What `load` makes of a target: which leaves, as what; and every misfit told in one error."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import trees
from orbax_side import assert_same, on
from things import stored

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

STATE = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": jnp.arange(3, dtype=jnp.bfloat16),
    "key": jax.random.key(0),
    "step": 3,
    "rate": 0.5,
    "done": True,
    "name": "run",
    "nothing": None,
    "empty": {"dict": {}, "list": [], "tuple": ()},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("targets") / "c", STATE).path


MISFITS: dict[str, tuple[str, Any]] = {
    "shape": ("w", np.zeros((3, 2), np.float32)),
    "rank": ("w", np.zeros(6, np.float32)),
    "dtype": ("w", np.zeros((2, 3), np.float64)),
    "dtype of the same size": ("w", np.zeros((2, 3), np.int32)),
    "dtype of JAX": ("b", jax.ShapeDtypeStruct((3,), jnp.float16)),
    "key for data": ("b", jax.random.split(jax.random.key(0), 3)),
    "data for a key": ("key", np.zeros(2, np.uint32)),
    "another kind of key": ("key", jax.random.key(0, impl="rbg")),
    "more keys": ("key", jax.random.split(jax.random.key(0), 3)),
    "array for a number": ("step", np.zeros(1, np.int64)),
    "number for an array": ("w", 0.0),
    "float for an integer": ("step", 0.0),
    "integer for a float": ("rate", 0),
    "integer for a bool": ("done", 0),
    "bool for an integer": ("step", False),
    "number for a string": ("name", 0),
    "string for a number": ("step", ""),
    "None for a leaf": ("w", None),
    "a leaf for None": ("nothing", np.zeros(())),
    "empty dict for None": ("nothing", {}),
    "an object": ("w", object()),
    "a leaf for an empty dict": ("empty", {"dict": 0, "list": [], "tuple": ()}),
    "a sharding that does not divide it": (
        "w",
        jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=on("x", "x")),
    ),
}
MENDED_BY_CAST = {"dtype", "dtype of the same size", "dtype of JAX", "float for an integer"}
MENDED_BY_CAST |= {"integer for a float", "integer for a bool", "bool for an integer"}


@pytest.mark.parametrize("case", MISFITS)
def test_leaf_that_does_not_fit_is_refused_by_name(path: Path, case: str) -> None:
    name, wanted = MISFITS[case]
    for cast in (False, True)[: 1 if case in MENDED_BY_CAST else 2]:
        with pytest.raises(fp.TargetMismatchError, match=name):
            fp.load(path, {**STATE, name: wanted}, cast=cast)


def test_every_misfit_is_told_in_one_error(path: Path) -> None:
    target = {key: value for key, value in STATE.items() if key not in ("rate", "name")}
    target |= {
        "w": np.zeros((7, 9), np.int8),
        "key": jax.random.key(0, impl="rbg"),
        "absent": np.zeros(3),
        "also": {"absent": 0},
        "step": 1.5,
    }
    with pytest.raises(fp.TargetMismatchError) as caught:
        fp.load(path, target)
    said = str(caught.value)
    for name in ("'rate'", "'name'", "'w'", "'key'", "'absent'", "'also.absent'", "'step'"):
        assert name in said
    assert "'b'" not in said
    for value in ("float32[2, 3]", "int8[7, 9]"):  # both sides of it
        assert value in said
    assert isinstance(caught.value, ValueError)


def test_partial_target_reads_only_what_it_names(tmp_path: Path) -> None:
    big = np.arange(100_000)
    fp.save(tmp_path / "c", {"kept": {"w": big}})
    lost = fp.save(tmp_path / "c", {"lost": {"w": big + 1}, "also": 3})
    fp.finalize(tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "state" / lost.part)
    target = {"kept": {"w": np.zeros_like(big)}}
    trees.assert_same(fp.load(tmp_path / "c", target, partial=True), {"kept": {"w": big}})
    with pytest.raises(fp.TargetMismatchError, match=r"lost\.w"):
        fp.load(tmp_path / "c", target)
    with pytest.raises(fp.CorruptCheckpointError, match=r"lost\.w"):
        fp.load(tmp_path / "c")


@pytest.mark.parametrize(
    "unwanted", [{"opt_state": None}, {"params": {"w": None}}], ids=["subtree", "leaf"]
)
def test_partial_target_has_none_where_it_wants_nothing(tmp_path: Path, unwanted: Any) -> None:
    saved = {"params": {"w": np.ones(2)}, "opt_state": {"mu": np.ones(2)}, "ema": None}
    path = stored(tmp_path / "c", saved).path
    target = saved | unwanted
    with pytest.raises(fp.TargetMismatchError):
        fp.load(path, target)
    trees.assert_same(fp.load(path, target, partial=True), target)


def test_partial_target_names_what_is_there(path: Path) -> None:
    trees.assert_same(fp.load(path, {"step": 0}, partial=True), {"step": 3})
    with pytest.raises(fp.TargetMismatchError, match="'absent'"):
        fp.load(path, {"absent": 0}, partial=True)


CASTS: dict[str, tuple[Any, Any, Any]] = {
    "float32 to bfloat16": (
        np.array([1.5, 3.14], np.float32),
        jax.ShapeDtypeStruct((2,), jnp.bfloat16),
        jnp.array([1.5, 3.14], jnp.bfloat16),
    ),
    "bfloat16 to float32": (
        jnp.array([1.5, -2], jnp.bfloat16),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        jnp.array([1.5, -2], jnp.float32),
    ),
    "int64 to int32": (np.array([5, -7]), np.zeros(2, np.int32), np.array([5, -7], np.int32)),
    "float32 to float8": (
        np.array([1, 2], np.float32),
        np.zeros(2, ml_dtypes.float8_e4m3fn),
        np.array([1, 2], ml_dtypes.float8_e4m3fn),
    ),
    "int4 to int8": (
        np.array([-8, 7], ml_dtypes.int4),
        np.zeros(2, np.int8),
        np.array([-8, 7], np.int8),
    ),
    "number to float": (3, 0.0, 3.0),
    "bool to integer": (True, 0, 1),
}


@pytest.mark.parametrize("case", CASTS)
def test_dtype_is_converted_only_where_asked_for(tmp_path: Path, case: str) -> None:
    saved, wanted, expected = CASTS[case]
    path = stored(tmp_path / "c", {"x": saved}).path
    with pytest.raises(fp.TargetMismatchError, match=r"'x'.*"):
        fp.load(path, {"x": wanted})
    trees.assert_same(fp.load(path, {"x": wanted}, cast=True), {"x": expected})


def test_cast_into_a_sharding(tmp_path: Path) -> None:
    array = np.arange(16, dtype=np.float32)
    target = {"x": jax.ShapeDtypeStruct((16,), jnp.bfloat16, sharding=on("x", "x"))}
    loaded = fp.load(stored(tmp_path / "c", {"x": array}).path, target, cast=True)
    assert_same(loaded, {"x": jax.device_put(array.astype(jnp.bfloat16), on("x", "x"))})


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (np.zeros((), np.float32), np.array(1.5, np.float32)),
        (np.float32(0), np.float32(1.5)),
        (jnp.zeros(()), jnp.array(1.5)),
        (0.0, 1.5),
    ],
    ids=["array", "scalar", "jax", "float"],
)
def test_zero_dimensional_leaf_fits_arrays_scalars_and_numbers_of_its_dtype(
    tmp_path: Path, target: Any, expected: Any
) -> None:
    path = stored(tmp_path / "c", {"x": np.float32(1.5)}).path
    trees.assert_same(fp.load(path, {"x": target}), {"x": expected})


@pytest.mark.parametrize("name", ["missing", "file", "directory", "session", "dangling link"])
def test_no_checkpoint_is_told_apart_from_a_damaged_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    match name:
        case "file":
            path.write_text("not a checkpoint")
        case "directory":
            path.mkdir()
        case "session":
            fp.save(path, {"x": 1})
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
    for call in (fp.load, fp.metadata, fp.verify):
        with pytest.raises(fp.NoSessionError):
            call(path)


def test_a_number_fits_an_array_of_its_family_as_in_jax(path: Path) -> None:
    """Flax's TrainState counts from a Python int on, and its counter is an array ever after."""
    target = {"step": jnp.int32(0), "rate": np.float32(0), "done": jnp.array(False)}  # noqa: FBT003
    expected = {"step": jnp.int32(3), "rate": np.float32(0.5), "done": jnp.array(True)}  # noqa: FBT003
    trees.assert_same(fp.load(path, target, partial=True), expected)
    with pytest.raises(fp.TargetMismatchError, match="step"):
        fp.load(path, {"step": jnp.float32(0)}, partial=True)


def test_a_number_that_does_not_fit_is_never_cut_off(tmp_path: Path) -> None:
    path = stored(tmp_path / "c", {"n": 2**40}).path
    with pytest.raises(fp.TargetMismatchError, match="1099511627776"):
        fp.load(path, {"n": jnp.int32(0)})
    assert fp.load(path, {"n": 0}) == {"n": 2**40}
