"""What a target and a checkpoint have in common, and what JAX makes of what is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from things import one_step, stored

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

if TYPE_CHECKING:
    from pathlib import Path

WEAK = {
    "a number": lambda: jnp.asarray(0.1),
    "an integer": lambda: jnp.asarray(3),
    "complex": lambda: jnp.asarray(1j),
    "an array": lambda: jnp.stack([jnp.asarray(0.5), jnp.asarray(1.5)]),
    "sharded": lambda: jax.device_put(
        jnp.stack([jnp.asarray(0.5 * number) for number in range(8)]),
        NamedSharding(trees.mesh("x"), PartitionSpec("x")),
    ),
}


@pytest.mark.parametrize("make", WEAK.values(), ids=WEAK)
def test_weak_type_comes_back_where_the_target_has_it(tmp_path: Path, make: Any) -> None:
    state = {"x": make()}
    assert state["x"].weak_type
    path = stored(tmp_path / "c", state).path
    loaded = fp.load(path, target=state)["x"]
    assert loaded.weak_type
    assert loaded.sharding == state["x"].sharding
    assert loaded.committed == state["x"].committed
    np.testing.assert_array_equal(loaded, state["x"])
    strong = jax.ShapeDtypeStruct(state["x"].shape, state["x"].dtype)
    assert not fp.load(path, target={"x": strong})["x"].weak_type


def test_array_that_jax_may_move_comes_back_as_one(tmp_path: Path) -> None:
    """Adam counts on the default device, beside moments that are spread over a mesh."""
    sharding = NamedSharding(trees.mesh("x"), PartitionSpec("x"))
    transform = optax.adam(1e-2)

    @jax.jit
    def step(state: Any) -> Any:
        updates, moments = transform.update(state["params"], state["opt_state"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": moments}

    params = {"w": jax.device_put(jnp.ones((8, 4)), sharding)}
    state = {"params": params, "opt_state": transform.init(params)}
    path = stored(tmp_path / "c", state).path
    loaded = fp.load(path, target=state)
    assert not loaded["opt_state"][0].count.committed
    assert loaded["params"]["w"].committed
    with jax.numpy_dtype_promotion("standard"):
        trees.assert_same(step(loaded), step(state))


def test_key_that_jax_may_move_comes_back_as_one(tmp_path: Path) -> None:
    state = {"key": jax.random.key(3)}
    loaded = fp.load(stored(tmp_path / "c", state).path, target=state)["key"]
    assert loaded.committed == state["key"].committed


def test_abstract_target_takes_the_mesh_in_force(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))

    def make() -> Any:
        return {"w": jnp.ones((8, 4), out_sharding=PartitionSpec("d"))}

    with jax.set_mesh(mesh):
        state = jax.jit(make)()
        target = jax.eval_shape(make)
        path = stored(tmp_path / "c", state).path
        loaded = fp.load(path, target=target)
    assert loaded["w"].sharding == state["w"].sharding
    trees.assert_same(loaded, state)
    with pytest.raises(fp.TargetMismatchError, match=r"jax\.set_mesh"):
        fp.load(path, target=target)


# --- what only one side has ---------------------------------------------------------------------

STATE = {"params": {"w": np.ones(3), "b": np.zeros(2)}, "step": 7}
SIDES: dict[str, tuple[Any, dict[str, bool], Any]] = {
    "the target lacks one": (
        {"params": {"w": np.zeros(3)}, "step": 0},
        {"partial": True},
        {"params": {"w": np.ones(3)}, "step": 7},
    ),
    "the target has more": (
        {**STATE, "head": np.full(2, 5.0), "note": "new"},
        {"keep_missing": True},
        {**STATE, "head": np.full(2, 5.0), "note": "new"},
    ),
    "each has one": (
        {"step": 0, "head": np.full(2, 5.0)},
        {"partial": True, "keep_missing": True},
        {"step": 7, "head": np.full(2, 5.0)},
    ),
}


@pytest.mark.parametrize("side", SIDES)
def test_leaves_that_one_side_has_are_all_named_unless_asked_for(tmp_path: Path, side: str) -> None:
    target, asked, expected = SIDES[side]
    path = stored(tmp_path / "c", STATE).path
    trees.assert_same(fp.load(path, target, **asked), expected)
    for option in asked:
        less = asked | {option: False}
        with pytest.raises(fp.TargetMismatchError) as caught:
            fp.load(path, target, **less)
        said = str(caught.value)
        assert option in said
        ours = {"partial": ["params.b"], "keep_missing": ["head"]}[option]
        assert all(repr(name) in said for name in ours)


def test_what_is_missing_cannot_be_kept_of_a_target_without_values(tmp_path: Path) -> None:
    path = stored(tmp_path / "c", STATE).path
    target = {**STATE, "head": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(fp.TargetMismatchError, match=r"'head'.* no value to keep"):
        fp.load(path, target, keep_missing=True)


# --- NNX ----------------------------------------------------------------------------------------


def net(seed: int) -> nnx.Module:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(seed))


TARGETS = {
    "module": lambda: net(1),
    "state": lambda: nnx.state(net(1)),
    "pure dict": lambda: nnx.to_pure_dict(nnx.state(net(1))),
    "eval_shape": lambda: nnx.state(nnx.eval_shape(lambda: net(1))),
}
SAVED = {
    "state": lambda: nnx.state(net(0)),
    "pure dict": lambda: nnx.to_pure_dict(nnx.state(net(0))),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("given", [*SAVED, "callback"])
def test_forms_of_an_nnx_model_match_one_another(tmp_path: Path, given: str, target: str) -> None:
    if given == "callback":
        callback = PartialCheckpointCallback(tmp_path / "run", every_n_train_steps=1)
        one_step(callback, {"params": net(0)}, lambda state: state)
        path = tmp_path / "run" / "1"
    else:
        path = stored(tmp_path / "c", {"params": SAVED[given]()}).path
    loaded = fp.load(path, target={"params": TARGETS[target]()})["params"]
    leaves = jax.tree.leaves(loaded)
    expected = jax.tree.leaves(nnx.state(net(0)))
    assert jax.tree.structure(loaded) == jax.tree.structure(TARGETS[target]())
    for one, other in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_attribute_called_value_of_something_else_is_a_name_like_others(tmp_path: Path) -> None:
    path = stored(tmp_path / "c", {"a": {"value": np.ones(2)}}).path
    with pytest.raises(fp.TargetMismatchError):
        fp.load(path, target={"a": np.zeros(2)})
