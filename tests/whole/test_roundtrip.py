"""What is saved comes back: every kind of tree, leaf, layout, sharding and dtype, to the bit."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from things import Element, stored, targets

import flax_partial as fp


@contextmanager
def new_path() -> Iterator[Path]:
    """Hypothesis draws many examples in one test: each needs a directory of its own."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory, "checkpoint")


@settings(max_examples=60)
@given(trees.trees, trees.options)
def test_tree_comes_back_without_a_target(tree: Any, options: fp.SaveOptions) -> None:
    with new_path() as path:
        stored(path, tree, options=options)
        trees.assert_whole(path, trees.as_nested(tree))
        for leaf in jax.tree.leaves(fp.load(path)):
            if isinstance(leaf, jax.Array):  # never on a remembered topology
                assert leaf.devices() == {jax.devices()[0]}
            if isinstance(leaf, np.ndarray):
                assert leaf.flags.writeable


@settings(max_examples=40)
@given(trees.trees, trees.options)
def test_tree_comes_back_into_its_own_structure(tree: Any, options: fp.SaveOptions) -> None:
    with new_path() as path:
        stored(path, tree, options=options)
        target = jax.tree.map(trees.emptied, tree, is_leaf=trees.is_empty)
        trees.assert_whole(path, tree, target=target)


@settings(max_examples=40)
@given(trees.jax_arrays(), trees.options, st.data())
def test_array_comes_back_in_the_sharding_of_the_target(
    array: jax.Array, options: fp.SaveOptions, data: st.DataObject
) -> None:
    sharding = data.draw(trees.shardings(array.shape))
    with new_path() as path:
        stored(path, {"w": array}, options=options)
        loaded = fp.load(path, targets({"w": array}, {"w": sharding}))
        trees.assert_same(loaded, {"w": array})
        assert loaded["w"].sharding == sharding


@settings(max_examples=40)
@given(trees.numpy_arrays(), trees.options, st.data())
def test_array_saved_slice_by_slice_comes_back_as_one(
    array: np.ndarray, options: fp.SaveOptions, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, max(array.ndim - 1, 0)))
    if array.ndim == 0 or not array.shape[axis]:
        array, axis = np.arange(7), 0
    size = array.shape[axis]
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    ranges = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    with new_path() as path:
        for start, end in ranges:
            rows = array.take(range(start, end), axis)
            value = fp.Slice(rows, start, size, axis - array.ndim * data.draw(st.integers(0, 1)))
            fp.save(path, {"w": value}, options=options)
        trees.assert_whole(fp.finalize(path).path, {"w": array})


@pytest.mark.parametrize("dtype", trees.DTYPES)
def test_every_dtype_comes_back_in_chunks_of_every_size(tmp_path: Path, dtype: str) -> None:
    """Sizes are odd and prime, and pass the bounds at which small, large and packed values part."""
    itemsize = trees.numpy_dtype(dtype).itemsize
    state = {
        f"{chunk_bytes}": {
            "one": trees.random_bits(dtype, (1,), 1),
            "row": trees.random_bits(dtype, (1031,), 2),
            "matrix": trees.random_bits(dtype, (1021, 307 // itemsize), 3),
            "cube": trees.random_bits(dtype, (5, 7, 11), 4),
        }
        for chunk_bytes in (100, 1024, 200_003, 1 << 20)
    }
    for chunk_bytes, group in state.items():
        options = fp.SaveOptions(durable=False, chunk_bytes=int(chunk_bytes))
        fp.save(tmp_path / "plain", {chunk_bytes: group}, options=options)
    packed = fp.SaveOptions(durable=False, chunk_bytes=997, compression="zstd")
    fp.save(tmp_path / "packed", state, options=packed)
    for name in ("plain", "packed"):
        trees.assert_whole(fp.finalize(tmp_path / name).path, state)


@pytest.mark.parametrize("dtype", trees.DTYPES)
def test_every_dtype_comes_back_as_a_sharded_array(tmp_path: Path, dtype: str) -> None:
    host = trees.random_bits(dtype, (1016, 48), 5)  # 127 rows of 24 on each device
    sharding = NamedSharding(trees.mesh("xy"), PartitionSpec("x", "y"))
    other = NamedSharding(trees.mesh("xyz"), PartitionSpec(None, ("z", "x")))
    with jax.enable_x64(new_val=True):
        array = jax.device_put(host, sharding)
        assert array.dtype.name == dtype
        stored(tmp_path / "c", {"w": array}, options=fp.SaveOptions(chunk_bytes=1009))
        loaded = fp.load(tmp_path / "c", targets({"w": array}, {"w": other}))
        assert loaded["w"].sharding == other
        trees.assert_same(loaded, {"w": array})
        trees.assert_same(fp.load(tmp_path / "c"), {"w": array})


def test_wide_jax_array_is_refused_and_not_narrowed_where_jax_has_no_such_dtype(
    tmp_path: Path,
) -> None:
    with jax.enable_x64(new_val=True):
        stored(tmp_path / "c", {"w": jnp.arange(3, dtype=jnp.int64)})
    with pytest.raises(fp.TargetMismatchError, match=r"'w'.*int64"):
        fp.load(tmp_path / "c")
    loaded = fp.load(tmp_path / "c", {"w": np.zeros(3, np.int64)})
    trees.assert_same(loaded, {"w": np.arange(3)})


SPECIAL = np.array([0x7FC00001, 0xFFC0BEEF, 0x7F800001, 0x80000000, 0x00000001], np.uint32)


def test_nan_payloads_and_signed_zero_survive_on_every_road(tmp_path: Path) -> None:
    floats = SPECIAL.view(np.float32)
    sharded = jax.device_put(np.tile(floats, 8), NamedSharding(trees.mesh("x"), PartitionSpec("x")))
    state = {
        "numpy": floats,
        "scalar": floats[1],
        "jax": jax.device_put(floats),
        "sharded": sharded,
        "float": math.copysign(math.nan, -1),
        "zero": -0.0,
        "complex": complex(-0.0, math.nan),
    }
    fp.save_async(tmp_path / "c", state)
    trees.assert_whole(fp.finalize(tmp_path / "c").path, state)


@pytest.mark.parametrize("impl", trees.KEY_IMPLS)
def test_keys_come_back_as_keys_sharded_as_the_target_says(tmp_path: Path, impl: str) -> None:
    keys = jax.random.split(jax.random.key(7, impl=impl), (8, 3))
    sharding = NamedSharding(trees.mesh("x"), PartitionSpec("x"))
    stored(tmp_path / "c", {"one": keys[0, 0], "many": jax.device_put(keys, sharding)})
    trees.assert_same(fp.load(tmp_path / "c"), {"one": keys[0, 0], "many": keys})
    other = NamedSharding(trees.mesh("xy"), PartitionSpec("y"))
    target = targets({"one": keys[0, 0], "many": keys}, {"one": None, "many": other})
    loaded = fp.load(tmp_path / "c", target)
    trees.assert_same(loaded, {"one": keys[0, 0], "many": keys})
    assert loaded["many"].sharding.is_equivalent_to(other, 2)
    assert fp.metadata(tmp_path / "c").leaves["many"].shape == (8, 3)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_nnx_state_and_its_optimizer_come_back(tmp_path: Path) -> None:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    state = {"params": nnx.state(model), "opt_state": nnx.state(optimizer)}
    stored(tmp_path / "c", {"params": state["params"]}, {"opt_state": state["opt_state"]})
    loaded = fp.load(tmp_path / "c", jax.eval_shape(lambda: state))
    assert isinstance(loaded["params"], nnx.State)
    trees.assert_same(loaded, state)
    nnx.update(model, loaded["params"])


OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
    "schedule": optax.inject_hyperparams(optax.sgd)(optax.constant_schedule(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optax_state_comes_back(tmp_path: Path, name: str) -> None:
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    state = {"opt": OPTIMIZERS[name].init(params)}
    stored(tmp_path / "c", state)
    trees.assert_whole(tmp_path / "c", state, target=jax.eval_shape(lambda: state))


def test_train_state_comes_back_and_goes_on(tmp_path: Path) -> None:
    params = FrozenDict({"w": jnp.ones((3, 2))})
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=optax.sgd(0.1, momentum=0.9))
    grads = jax.tree.map(jnp.ones_like, params)
    state = state.apply_gradients(grads=grads)
    stored(tmp_path / "c", state)
    loaded = fp.load(tmp_path / "c", jax.tree.map(trees.emptied, state))
    trees.assert_same(loaded, state)
    trees.assert_same(loaded.apply_gradients(grads=grads), state.apply_gradients(grads=grads))


def test_leaves_are_found_by_name_whatever_their_containers(tmp_path: Path) -> None:
    w, b = np.arange(3), np.arange(4)
    stored(tmp_path / "c", {"block": trees.Block(w, b), "pair": trees.Pair(1, "two")})
    target = {"block": FrozenDict(bias=b * 0, kernel=w * 0), "pair": {"right": "", "left": 0}}
    loaded = fp.load(tmp_path / "c", target)
    trees.assert_same(
        loaded, {"block": FrozenDict(bias=b, kernel=w), "pair": {"right": "two", "left": 1}}
    )


KEYS = {
    "slashes": {"a/b": np.arange(2), "/": np.arange(3), "a": {"b/": 1}},
    "zarr names": {"c": np.arange(2), "zarr.json": np.arange(3), "d": {"c": {"0": np.arange(4)}}},
    "non-ASCII": {"größe": np.arange(2), "层": {"重み": np.arange(3)}, "🎲": 1},
    "empty": {"": np.arange(3), "a": {"": np.arange(2)}, "c": np.arange(4)},
    "integers": {-1: 1, 0: np.arange(2), 10**30: "x"},
    "JSON pointers": {"~0": "a", "~1": "b", "a~1b": "c", "m~": {"x/y": "d"}},
    "strings under one": {"a": "x", "a/b": "y"},
}


@pytest.mark.parametrize("name", KEYS)
def test_unusual_keys_come_back(tmp_path: Path, name: str) -> None:
    stored(tmp_path / "c", KEYS[name])
    trees.assert_whole(tmp_path / "c", KEYS[name])


@pytest.mark.parametrize("state", [np.arange(3), 5, "text", [1, 2], (1, None)], ids=repr)
def test_state_need_not_be_a_dict(tmp_path: Path, state: Any) -> None:
    stored(tmp_path / "c", state)
    trees.assert_same(fp.load(tmp_path / "c"), trees.as_nested(state))
    trees.assert_same(fp.load(tmp_path / "c", state), state)


def test_lists_and_tuples_saved_an_element_at_a_time_come_back_in_order(tmp_path: Path) -> None:
    stored(tmp_path / "c", *(Element(index, np.arange(index)) for index in reversed(range(12))))
    trees.assert_whole(tmp_path / "c", [np.arange(index) for index in range(12)])


def test_metadata_says_what_is_there_without_reading_arrays(tmp_path: Path) -> None:
    sharded = jax.device_put(
        np.zeros((16, 4), np.float32), NamedSharding(trees.mesh("xy"), PartitionSpec("x", "y"))
    )
    state = {"w": sharded, "n": np.zeros(3, ">i2"), "k": jax.random.key(0), "s": "text", "e": {}}
    before = fp.save(tmp_path / "c", state, custom_metadata={"step": 3}).committed_at
    returned = fp.finalize(tmp_path / "c")
    state_files = tmp_path / "c" / "state"
    for file in (*state_files.glob("part.*/data"), *state_files.glob("d/*")):
        file.unlink()
    found = fp.metadata(tmp_path / "c")
    assert found == returned
    assert found.path == tmp_path / "c"
    assert found.custom_metadata == {"step": 3}
    assert found.parts == 1
    assert found.started_at <= before <= found.committed_at
    assert found.bytes == 256 + 6 + 8
    described = {name: (one.shape, one.dtype, one.bytes) for name, one in found.leaves.items()}
    assert described["w"] == ((16, 4), "float32", 256)
    assert described["n"] == ((3,), "int16", 6)
    assert described["k"] == ((), "key<fry>", 8)
    assert set(described) == {"w", "n", "k", "s", "e"}
    sharding = found.leaves["w"].sharding
    assert sharding is not None
    assert sharding["partition_spec"] == ["x", "y"]
    assert found.leaves["n"].sharding is None


def test_default_device_is_where_arrays_come_back(tmp_path: Path) -> None:
    stored(tmp_path / "c", {"w": jax.device_put(np.arange(3), jax.devices()[5])})
    with jax.default_device(jax.devices()[2]):
        assert fp.load(tmp_path / "c")["w"].devices() == {jax.devices()[2]}
        target = {"w": jax.ShapeDtypeStruct((3,), jnp.int32)}
        assert fp.load(tmp_path / "c", target)["w"].devices() == {jax.devices()[2]}
    target = targets(target, {"w": SingleDeviceSharding(jax.devices()[4])})
    assert fp.load(tmp_path / "c", target)["w"].devices() == {jax.devices()[4]}
