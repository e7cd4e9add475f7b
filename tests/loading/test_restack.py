"""Layers are loaded however they are stacked, or under other names; and some of them alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from layouts import LAYERS, LAYOUTS, VALUES, Layout, shapes, train_state
from orbax.checkpoint import v1 as ocp
from things import QUICK, one_step, stored

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

if TYPE_CHECKING:
    from pathlib import Path


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert getattr(one, "sharding", None) == getattr(other, "sharding", None)
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training state in each layout."""
    directory = tmp_path_factory.mktemp("layouts")
    for name, layout in LAYOUTS.items():
        stored(directory / name, train_state(layout))
    return directory


PAIRS = {f"{a} -> {b}": (a, b) for a, b in itertools.permutations(LAYOUTS, 2)}


@pytest.mark.parametrize(("saved", "wanted"), PAIRS.values(), ids=PAIRS)
def test_layers_and_their_moments_are_restacked(checkpoints: Path, saved: str, wanted: str) -> None:
    state = train_state(LAYOUTS[wanted])
    restack = {LAYOUTS[saved].stack: LAYOUTS[wanted].stack}
    assert_same(fp.load(checkpoints / saved, shapes(state), restack=restack), state)


def test_what_orbax_saved_is_restacked(tmp_path: Path) -> None:
    saved, wanted = LAYOUTS["scan without pipeline"], LAYOUTS["pipeline of 4 stages, 2 repeats"]
    ocp.save(tmp_path / "c", train_state(saved))
    state = train_state(wanted)
    assert_same(fp.load(tmp_path / "c", shapes(state), restack={saved.stack: wanted.stack}), state)


def test_callback_restores_into_another_stack(tmp_path: Path) -> None:
    saved, wanted = LAYOUTS["pipeline of 4 stages, 2 repeats"], LAYOUTS["scan without pipeline"]
    callback = PartialCheckpointCallback(tmp_path, stacked=saved.stacked, options=QUICK)
    one_step(callback, train_state(saved), lambda state: state)
    state = train_state(wanted)
    restored = callback.restore(shapes(state), restack={saved.stack: wanted.stack})
    assert restored is not None
    assert_same(restored[0], state)


def test_only_layers_that_are_asked_for_are_read(checkpoints: Path) -> None:
    name = "pipeline of 4 stages, 2 repeats"
    one = jax.ShapeDtypeStruct(VALUES.shape[1:], np.float32)
    target = {"params": {"decoder": {"layers_7": {"mlp": {"wi_0": {"kernel": one}}}}}}
    restack = {LAYOUTS[name].stack: "decoder.layers_{}"}
    found = fp.load(checkpoints / name, target, restack=restack, partial=True)
    kernel = found["params"]["decoder"]["layers_7"]["mlp"]["wi_0"]["kernel"]
    np.testing.assert_array_equal(kernel, VALUES[7])


def test_leaves_of_every_kind_are_restacked(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(0), LAYERS)
    saved = {
        "keys": keys,
        "small": np.arange(LAYERS, dtype=np.float64),
        "int4": jnp.asarray(np.arange(2 * LAYERS) % 8, jnp.int4).reshape(LAYERS, 2),
        "empty": np.zeros((LAYERS, 0)),
    }
    stored(tmp_path / "c", {"layers": saved, "step": 3, "other": np.ones(LAYERS)})
    layers = [jax.tree.map(lambda x, i=i: x[i], saved) for i in range(LAYERS)]
    target = {"layers": layers, "step": 0, "other": np.zeros(LAYERS)}
    stack = fp.Stack("layers", 0)
    found = fp.load(tmp_path / "c", target, restack={stack: "layers.{}"})
    assert found["step"] == 3
    assert_same_leaves(found["layers"], layers)
    stored(tmp_path / "d", {"layers": found["layers"]})
    back = fp.load(tmp_path / "d", {"layers": saved}, restack={"layers.{}": stack})
    assert_same_leaves(back["layers"], saved)


def assert_same_leaves(found: Any, wanted: Any) -> None:
    """As `assert_same`, for keys too, and wherever they are."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))  # noqa: PLW2901
        np.testing.assert_array_equal(one, other)


def test_leaf_that_lacks_the_axes_is_loaded_as_it_is(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"old": {"w": np.arange(8.0).reshape(2, 4), "count": np.int32(3)}})
    target = {"new": {"w": np.zeros((4, 2)), "count": np.int32(0)}}
    restack = {fp.Stack("old", (0, 1)): fp.Stack("new", (0, 1))}
    found = fp.load(tmp_path / "c", target, restack=restack)["new"]
    assert found["count"] == 3
    np.testing.assert_array_equal(found["w"], np.arange(8.0).reshape(4, 2))


def test_dtypes_are_converted_if_asked_for_and_numbers_stay(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"layers": np.arange(6.0).reshape(3, 2)})
    target = {f"layers_{i}": jax.ShapeDtypeStruct((2,), jnp.bfloat16) for i in range(3)}
    restack = {fp.Stack("layers", 0): "layers_{}"}
    with pytest.raises(fp.TargetMismatchError, match=r"'layers_0' is float64\[2\].*bfloat16\[2\]"):
        fp.load(tmp_path / "c", target, restack=restack)
    found = fp.load(tmp_path / "c", target, restack=restack, cast=True)
    assert found["layers_2"].tolist() == [4, 5]


MISFITS: dict[str, tuple[Any, dict[Any, Any], str]] = {
    "fewer layers": (
        {"new": np.zeros((6, 2))}, {fp.Stack("old", 0): fp.Stack("new", 0)}, "and the target 6"
    ),
    "another layer": (
        {"new_8": np.zeros(2)}, {fp.Stack("old", 0): "new_{}"}, "has 8 layers.* number 8"
    ),
    "other rank": (
        {"new": np.zeros((8, 2, 1))}, {fp.Stack("old", 0): fp.Stack("new", 0)}, "cannot be"
    ),
    "another shape": (
        {"new": np.zeros((8, 3))}, {fp.Stack("old", 0): fp.Stack("new", 0)}, r"\[8, 2\].*\[8, 3\]"
    ),
    "no array": ({"new": "text"}, {fp.Stack("old", 0): fp.Stack("new", 0)}, "is no array"),
    "nothing saved": (
        {"new": np.zeros((8, 2))}, {fp.Stack("odd", 0): fp.Stack("new", 0)}, "'new' is not in the"
    ),
    "nothing wanted": (
        {"new": np.zeros((8, 2))}, {fp.Stack("old", 0): fp.Stack("nwe", 0)}, "called so.*'nwe'"
    ),
    "layers that differ": (
        {"new": np.zeros((2, 2))}, {"uneven_{}": fp.Stack("new", 0)}, "are no layers of a stack"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("target", "restack", "said"), MISFITS.values(), ids=MISFITS)
def test_what_cannot_be_restacked_is_told(
    tmp_path: Path, target: Any, restack: Any, said: str
) -> None:
    uneven = {"uneven_0": np.zeros(2), "uneven_1": np.zeros(3)}
    stored(tmp_path / "c", {"old": np.arange(16.0).reshape(8, 2), **uneven})
    with pytest.raises(fp.TargetMismatchError, match=said):
        fp.load(tmp_path / "c", target, restack=restack, partial=True)


@pytest.mark.parametrize(
    ("name", "axes", "error"),
    [("layers", (), ValueError), ("", 0, ValueError), ("l_{}.{}", 0, ValueError),
     ("layers", 1.0, TypeError), ("layers", (0, True), TypeError), (7, 0, TypeError)],
    ids=str,
)  # fmt: skip
def test_stack_that_says_nothing_is_refused(name: Any, axes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="Stack"):
        fp.Stack(name, axes)


def test_restack_and_renames_want_a_target_and_names(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"w": 1})
    for how in ({"restack": {fp.Stack("a", 0): "b_{}"}}, {"renames": {"a": "b"}}):
        with pytest.raises(ValueError, match="pass a target"):
            fp.load(tmp_path / "c", **how)
    for how in ({"restack": {0: 1}}, {"renames": {"w": 1}}):
        with pytest.raises(TypeError, match="maps"):
            fp.load(tmp_path / "c", {"w": 1}, **how)


RENAMES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "a root": ({"params": "model"}, {"model": {"a": {"w": 1}, "b": 2}, "mu": {"a": {"w": 3}}}),
    "wherever it stands": (
        {"a": "c.d"}, {"params": {"c": {"d": {"w": 1}}, "b": 2}, "mu": {"c": {"d": {"w": 3}}}}
    ),
    "the longest": (
        {"a": "c", "params.b": "c.b"},
        {"params": {"c": {"w": 1}}, "c": {"b": 2}, "mu": {"c": {"w": 3}}},
    ),
    "below a new root": (
        {"": "all"}, {"all": {"params": {"a": {"w": 1}, "b": 2}, "mu": {"a": {"w": 3}}}}
    ),
    "a root that is gone": ({"params": ""}, {"a": {"w": 1}, "b": 2}),
}  # fmt: skip


@pytest.mark.parametrize(("renames", "wanted"), RENAMES.values(), ids=RENAMES)
def test_what_moved_is_found(tmp_path: Path, renames: Any, wanted: Any) -> None:
    stored(tmp_path / "c", {"params": {"a": {"w": 1}, "b": 2}, "mu": {"a": {"w": 3}}})
    target = jax.tree.map(lambda _: 0, wanted)
    is_partial = "mu" not in str(wanted)
    assert fp.load(tmp_path / "c", target, renames=renames, partial=is_partial) == wanted


def test_name_that_moved_nowhere_is_told(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"w": 1})
    with pytest.raises(fp.TargetMismatchError, match="called so: renames, 'x'"):
        fp.load(tmp_path / "c", {"w": 0}, renames={"v": "x"})
    with pytest.raises(fp.TargetMismatchError, match=r"'x\.w' is not.*called 'v\.w'"):
        fp.load(tmp_path / "c", {"x": {"w": 0}}, renames={"v": "x"}, partial=True)
    target = {"x": {"w": 7}}
    kept = fp.load(tmp_path / "c", target, renames={"v": "x"}, partial=True, keep_missing=True)
    assert kept == target


def test_nnx_modules_are_restacked_in_place(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self, layers: dict[str, jax.Array]) -> None:
            for name, value in layers.items():
                setattr(self, name, nnx.Param(value))

    values = jnp.arange(6.0).reshape(3, 2)
    one = Model({"layers": values})
    other = Model({f"layers_{i}": jnp.zeros(2) for i in range(3)})
    callback = PartialCheckpointCallback(tmp_path, options=QUICK)
    optimizer = nnx.Optimizer(one, optax.adam(1.0), wrt=nnx.Param)
    one_step(callback, {"params": one, "opt_state": optimizer}, lambda state: state)
    optimizer = nnx.Optimizer(other, optax.adam(1.0), wrt=nnx.Param)
    target = {"params": other, "opt_state": optimizer}
    callback.restore(target, restack={fp.Stack("layers", 0): "layers_{}"})
    for i in range(3):
        np.testing.assert_array_equal(getattr(other, f"layers_{i}")[...], values[i])


# A Slice as a target.


STACK = np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
SLICES: dict[str, tuple[Any, Any]] = {
    "one row": (fp.Slice(jax.ShapeDtypeStruct((1, 6, 5), np.float32), 2, 4), np.s_[2:3]),
    "rows along two axes": (
        fp.Slice(jax.ShapeDtypeStruct((2, 1, 5), np.float32), (1, 5), (4, 6), (0, 1)),
        np.s_[1:3, 5:6],
    ),
    "into host memory": (fp.Slice(np.zeros((4, 6, 2), np.float32), 3, 5, -1), np.s_[..., 3:]),
}


@pytest.mark.parametrize("is_cut", [False, True], ids=["saved whole", "saved by rows"])
@pytest.mark.parametrize(("target", "index"), SLICES.values(), ids=SLICES)
def test_some_rows_of_a_leaf_are_loaded(
    tmp_path: Path, target: Any, index: Any, *, is_cut: bool
) -> None:
    rows = [{"w": fp.Slice(STACK[i : i + 1], i, 4)} for i in range(4)]
    stored(tmp_path / "c", *(rows if is_cut else [{"w": STACK}]))
    found = fp.load(tmp_path / "c", {"w": target})["w"]
    assert isinstance(found, np.ndarray) == isinstance(target.value, np.ndarray)
    np.testing.assert_array_equal(found, STACK[index])


def test_rows_are_sharded_as_the_target_says_and_keys_are_cut(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(1), 4)
    stored(tmp_path / "c", {"w": STACK, "keys": keys})
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), PartitionSpec(None, "x"))
    wanted = jax.ShapeDtypeStruct((2, 6, 5), np.float32, sharding=sharding)
    target = {"w": fp.Slice(wanted, 1, 4), "keys": fp.Slice(keys[:1], 3, 4)}
    found = fp.load(tmp_path / "c", target)
    assert found["w"].sharding == sharding
    np.testing.assert_array_equal(found["w"], STACK[1:3])
    for one, other in zip(*map(jax.random.key_data, (found["keys"], keys[3:])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_of_a_restacked_leaf_are_loaded(checkpoints: Path) -> None:
    name = "2 layers a stage, scanned"
    wanted: Layout = LAYOUTS["pipeline without repeats"]
    value = fp.Slice(jax.ShapeDtypeStruct((3, 32, 64), np.float32), 4, LAYERS)
    target = {"params": jax.tree.map(lambda _: value, wanted.tree(VALUES))}
    restack = {LAYOUTS[name].stack: wanted.stack}
    (found,) = jax.tree.leaves(fp.load(checkpoints / name, target, partial=True, restack=restack))
    np.testing.assert_array_equal(found, VALUES[4:7])


WRONG_SLICES: dict[str, tuple[fp.Slice, str]] = {
    "outside": (fp.Slice(np.zeros((2, 6, 5), np.float32), 3, 4), "rows 3 to 5 of 4"),
    "of another size": (fp.Slice(np.zeros((1, 6, 5), np.float32), 0, 5), r"rows of \[5, axis 0\]"),
    "of another shape": (fp.Slice(np.zeros((1, 6, 4), np.float32), 0, 4), r"rows of \[4, axis 0\]"),
    "of another dtype": (fp.Slice(np.zeros((1, 6, 5), np.int32), 0, 4), "float32"),
    "of no array": (fp.Slice(3, 0, 4), "of an array of shape"),
    "of too many axes": (fp.Slice(np.zeros((1, 6, 5, 1), np.float32), 0, 4), "rows of"),
}


@pytest.mark.parametrize(("target", "said"), WRONG_SLICES.values(), ids=WRONG_SLICES)
def test_rows_that_are_not_there_are_told(tmp_path: Path, target: fp.Slice, said: str) -> None:
    stored(tmp_path / "c", {"w": STACK})
    with pytest.raises(fp.TargetMismatchError, match=said):
        fp.load(tmp_path / "c", {"w": target})


def test_missing_rows_stay_as_they_are_where_there_is_a_value(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"w": 1})
    value = np.ones((1, 2))
    target = {"v": fp.Slice(value, 0, 4)}
    assert fp.load(tmp_path / "c", target, partial=True, keep_missing=True)["v"] is value
