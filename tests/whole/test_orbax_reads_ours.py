"""Every reader of Orbax reads our checkpoints: value, dtype, sharding and structure.

What a table here leaves out is what Orbax itself cannot do; the comments say where.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
import trees
from flax import nnx
from flax.core import FrozenDict
from hypothesis import assume, given, settings
from jax import tree_util
from orbax.checkpoint.experimental import v1
from orbax_side import (
    READERS,
    STEP,
    Nothing,
    abstract,
    as_nested,
    as_orbax,
    assert_same,
    has_strings,
    keys,
    map_leaves,
    on,
    on_device,
    optimizer_state,
    read_v0_pytree,
    read_v0_standard,
    read_v1,
    sharded,
    train_state,
)

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUICK = fp.SaveOptions(durable=False)


@pytest.fixture(autouse=True, scope="module")
def _wide_types() -> Iterator[None]:
    """Lets JAX have 64 bits, so that every dtype takes part."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)  # noqa: FBT003 - JAX's own signature
    yield
    jax.config.update("jax_enable_x64", before)


# --- what is saved


def jax_dtypes() -> Any:
    return {name: jnp.asarray(trees.random_bits(name, (3, 5), 1)) for name in trees.DTYPES}


def numpy_dtypes() -> Any:
    return {name: trees.random_bits(name, (3, 5), 2) for name in trees.DTYPES}


def numpy_scalars() -> Any:
    return {name: trees.random_bits(name, (2,), 3)[0] for name in trees.DTYPES}


def sharded_keys() -> jax.Array:
    return jax.device_put(jax.random.split(jax.random.key(1), 8), on("xy", "y"))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.first = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))


STATES: dict[str, Callable[[], Any]] = {
    "jax-dtypes": jax_dtypes,
    "numpy-dtypes": numpy_dtypes,
    "numpy-scalars": numpy_scalars,
    "zero-dim": lambda: {"jax": jnp.float32(2.5), "numpy": np.array(7, np.int16)},
    "zero-size": lambda: {"jax": jnp.zeros((0, 3)), "numpy": np.zeros((2, 0, 4), np.int8)},
    "all-zeros": lambda: {"jax": jnp.zeros((4, 4)), "numpy": np.zeros(9)},
    "non-finite": lambda: np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324]),
    "fortran-order": lambda: np.asfortranarray(np.arange(12).reshape(3, 4)),
    "last-device": lambda: on_device(7),
    "sharded-rows": lambda: sharded("x", "x"),
    "sharded-both": lambda: sharded("xy", "x", "y"),
    "sharded-columns-only": lambda: sharded("xy", None, "y"),
    "sharded-by-two-axes": lambda: sharded("xyz", ("x", "z"), "y"),
    "sharded-short-spec": lambda: sharded("xyz", "y"),
    "replicated": lambda: sharded("xy"),
    "replicated-scalar": lambda: jax.device_put(jnp.int32(4), on("xyz")),
    "key-threefry": lambda: jax.random.key(0, impl="threefry2x32"),
    "key-rbg": lambda: jax.random.key(5, impl="rbg"),
    "key-unsafe-rbg": lambda: jax.random.key(6, impl="unsafe_rbg"),
    "keys": keys,
    "keys-sharded": sharded_keys,
    "ints": lambda: [0, -5, 2**63 - 1, -(2**63), 2**63, 2**64 - 1],
    "bools": lambda: [True, False],
    "floats": lambda: [2.5, -0.0, float("inf"), float("nan"), 5e-324],
    "complex": lambda: [1 + 2j, complex("nan")],
    "none": lambda: None,
    "empty-dict": dict,
    "empty-list": list,
    "empty-tuple": tuple,
    "empty-named-tuple": Nothing,
    "nested-dicts": lambda: {"a": {"b": {"c": np.ones(2)}, "d": 1}, "z": 2.0},
    "odd-names": lambda: {"a b": 1, "ü/\n": np.ones(1), "..": jnp.ones(2), "c": {"0": 2}, "~": 3},
    "integer-keys": lambda: {0: jnp.ones(2), 10: {-3: 1}},
    "long-list": lambda: [np.full(2, i) for i in range(12)],
    "nested-lists": lambda: [[1, [2.0, []]], {"a": [None]}],
    "tuples": lambda: (1, (jnp.ones(2), ({"a": (2,)},))),
    "named-tuple": lambda: trees.Pair(jnp.ones(2), trees.Pair(1, np.zeros(3))),
    "dataclass": lambda: trees.Block(jnp.ones((2, 2)), {"x": trees.Block(1, None)}),
    "frozen-dict": lambda: FrozenDict({"a": {"b": jnp.ones(2)}, "c": 3}),
    "nnx-state": lambda: nnx.state(Net()),
    "train-state": train_state,
    "optax": optimizer_state,
}
# v0's StandardCheckpointer refuses strings, whoever saved them, where it is given a target.
STRINGS: dict[str, Callable[[], Any]] = {
    "strings": lambda: ["text", "", "ü\n\0\u2028", "1", "null"],
    "string-names": lambda: {"a.b": "x", "a/b": "y", "a/c/d": "z", "": "w", "0": "v"},
}


# --- all states, by all readers


def stored(path: Path, *states: Any, options: fp.SaveOptions = QUICK) -> Path:
    for state in states:
        fp.save(path, state, options=options, replace=True)
    fp.finalize(path)
    return path


@dataclass(frozen=True)
class Stored:
    """A case, saved; all readers share it, as none may change it."""

    path: Path
    state: Any


@pytest.fixture(scope="module", params=[*STATES, *STRINGS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    make = (STATES | STRINGS)[request.param]
    state = {"x": make(), "other": jnp.arange(2)}
    return Stored(stored(tmp_path_factory.mktemp(request.param) / str(STEP), state), state)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_orbax_reads_without_a_target(reader: Any, case: Stored) -> None:
    assert_same(reader(case.path, None), as_nested(case.state))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_orbax_reads_into_a_target(reader: Any, case: Stored) -> None:
    target = map_leaves(abstract, case.state)
    if reader is read_v0_standard and has_strings(target):
        pytest.skip("StandardCheckpointer takes no target with strings, whoever saved them")
    assert_same(reader(case.path, target), map_leaves(as_orbax, case.state))


@pytest.mark.parametrize("reader", [read_v1, read_v0_standard, read_v0_pytree])
def test_orbax_reshards_into_a_target(reader: Any, tmp_path: Path) -> None:
    path = stored(tmp_path / str(STEP), {"x": sharded("xy", "x", "y"), "y": on_device(7)})
    want = {"x": sharded("xyz", "z", ("y", "x")), "y": jax.device_put(on_device(2), on("x"))}
    assert_same(reader(path, jax.tree.map(abstract, want)), want)


# --- what our saves can do, and a save of Orbax cannot

BIG = np.arange(24.0).reshape(6, 4)
SESSIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "three-parts": (
        ({"a": {"x": BIG}}, {"b": [1, "two"]}, {"a": {"y": np.ones(3)}}),
        {"a": {"x": BIG, "y": np.ones(3)}, "b": [1, "two"]},
    ),
    "replaced": (
        ({"a": BIG, "b": 1}, {"a": BIG[:2] + 1}, {"b": "now"}),
        {"a": BIG[:2] + 1, "b": "now"},
    ),
    "slices": (
        [{"a": fp.Slice(BIG[i : i + 2], i, 6)} for i in (4, 0, 2)],
        {"a": BIG},
    ),
    "slices-of-columns": (
        [{"a": fp.Slice(BIG[:, i : i + 1], i, 4, axis=1)} for i in range(4)],
        {"a": BIG},
    ),
    "slices-of-both": (
        [
            {"a": fp.Slice(BIG[i : i + 2, j : j + 1], (i, j), (6, 4), (0, 1))}
            for i in (4, 0, 2)
            for j in range(4)
        ],
        {"a": BIG},
    ),
}
OPTIONS = {
    "plain": QUICK,
    "zstd": fp.SaveOptions(durable=False, compression="zstd"),
    "blosc": fp.SaveOptions(durable=False, compression="blosc"),
    "small-chunks": fp.SaveOptions(durable=False, chunk_bytes=32),
    "no-digests": fp.SaveOptions(durable=False, checksum=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("states", "want"), SESSIONS.values(), ids=SESSIONS)
def test_orbax_reads_what_many_saves_add_up_to(
    states: Any, want: Any, options: fp.SaveOptions, tmp_path: Path
) -> None:
    path = stored(tmp_path / "checkpoint", *states, options=options)
    assert_same(v1.load(path), want)
    assert_same(read_v0_pytree(path, None), want)


def test_data_that_was_lost_is_an_error_for_orbax_and_not_zeros(tmp_path: Path) -> None:
    path = stored(tmp_path / "checkpoint", {"a": np.ones(1000)})
    (part,) = path.glob("state/part.*")
    (part / "data").unlink()
    with pytest.raises(ValueError, match="a/c/0"):
        v1.load(path)


@settings(max_examples=20)
@given(trees.trees)
def test_orbax_reads_any_tree_that_it_can_name(tree: Any) -> None:
    # It finds a string by a JSON pointer, in which "~" begins an escape.
    pointers = [path for path, leaf in trees.flat(tree)[0] if isinstance(leaf, str)]
    assume(not any("~" in tree_util.keystr(path) for path in pointers))
    with tempfile.TemporaryDirectory() as directory:
        path = stored(Path(directory, "checkpoint"), tree)
        assert_same(v1.load(path), as_nested(tree))


# --- metadata and runs


def test_orbax_describes_our_checkpoint(tmp_path: Path) -> None:
    state = {"x": sharded("xy", "x"), "n": np.zeros((2, 3), np.int8), "s": "text", "i": 1}
    fp.save(tmp_path / str(STEP), state, custom_metadata={"run": {"lr": 0.1}}, options=QUICK)
    fp.save(tmp_path / str(STEP), {"z": 2}, custom_metadata={"run": {"seed": 1}}, options=QUICK)
    committed = fp.finalize(tmp_path / str(STEP))
    described = v1.metadata(tmp_path / str(STEP))
    assert described.custom_metadata == {"run": {"lr": 0.1, "seed": 1}}
    assert described.init_timestamp_nsecs / 1e9 == committed.started_at
    assert described.commit_timestamp_nsecs / 1e9 == committed.committed_at
    leaf = described.metadata["x"]
    assert (leaf.shape, leaf.dtype) == ((8, 16), np.float64)
    assert leaf.sharding_metadata.to_jax_sharding() == on("xy", "x")
    assert described.metadata["n"].shape == (2, 3)
    with v0.CheckpointManager(tmp_path) as manager:
        assert manager.metadata(STEP).custom_metadata == described.custom_metadata


def test_managers_see_finalized_steps_only(tmp_path: Path) -> None:
    for step in (1, 20):
        stored(tmp_path / str(step), {"step": step})
    fp.save(tmp_path / "30", {"step": 30}, options=QUICK)
    with v0.CheckpointManager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [1, 20]
        assert manager.latest_step() == 20
        assert manager.restore(1)["state"] == {"step": 1}
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [1, 20]
    fp.finalize(tmp_path / "30")
    assert fp.steps(tmp_path) == [1, 20, 30]


def test_a_manager_goes_on_from_our_steps(tmp_path: Path) -> None:
    stored(tmp_path / "1", {"a": np.ones(3)})
    with v0.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=v0.args.StandardSave({"a": np.zeros(3)}))
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [1, 2]
    assert fp.steps(tmp_path) == [1, 2]
    assert_same(fp.load(tmp_path / "2"), {"a": np.zeros(3)})
    assert_same(fp.load(tmp_path / "1"), {"a": np.ones(3)})
