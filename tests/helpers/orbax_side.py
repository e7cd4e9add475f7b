"""What the tests with Orbax share: its readers, leaves, and what Orbax makes of a tree."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as v0
import trees
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax import tree_util
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import checkpoint_utils
from orbax.checkpoint.experimental import v1

STEP = 3  # what a checkpoint has to be named for the readers that look for steps


class Nothing(NamedTuple):
    """A named tuple without fields, as in many Optax states."""


def on(name: str, *spec: Any) -> NamedSharding:
    return NamedSharding(trees.mesh(name), PartitionSpec(*spec))


def sharded(name: str, *spec: Any) -> jax.Array:
    return jax.device_put(jnp.arange(128.0).reshape(8, 16), on(name, *spec))


def on_device(index: int) -> jax.Array:
    return jax.device_put(jnp.arange(3.0), jax.devices()[index])


def keys() -> Any:
    """Arrays of PRNG keys, of every implementation."""
    return {
        impl: jax.random.split(jax.random.key(7, impl=impl), (2, 3)) for impl in trees.KEY_IMPLS
    }


def train_state() -> TrainState:
    params = FrozenDict({"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}})
    return TrainState.create(apply_fn=len, params=params, tx=optax.adam(1e-3))


def optimizer_state() -> Any:
    chain = optax.chain(optax.clip(1.0), optax.adamw(1e-3), optax.ema(0.9))
    return chain.init({"w": jnp.ones((2, 2)), "b": [jnp.zeros(2), jnp.zeros(())]})


def bits(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """An array of each dtype."""
    return {name: trees.random_bits(name, shape, 1) for name in trees.DTYPES}


class _Net(nnx.Module):
    def __init__(self) -> None:
        self.first = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(1))


STATES: dict[str, Callable[[], Any]] = {
    "jax-dtypes": lambda: jax.tree.map(jnp.asarray, bits((3, 5))),
    "numpy-dtypes": lambda: bits((3, 5)),
    "zero-dim": lambda: {"jax": jnp.float32(2.5), "numpy": np.array(7, np.int16)},
    "all-zeros": lambda: {"jax": jnp.zeros((4, 4)), "numpy": np.zeros(9)},
    "fortran-order": lambda: np.asfortranarray(np.arange(12).reshape(3, 4)),
    "keys": keys,
    "integer-keys": lambda: {0: jnp.ones(2), 10: {-3: 1}},
    "named-tuple": lambda: trees.Pair(jnp.ones(2), trees.Pair(1, np.zeros(3))),
    "dataclass": lambda: trees.Block(jnp.ones((2, 2)), {"x": trees.Block(1, None)}),
    "frozen-dict": lambda: FrozenDict({"a": {"b": jnp.ones(2)}, "c": 3}),
    "nnx-state": lambda: nnx.state(_Net()),
    "train-state": train_state,
    "optax": optimizer_state,
}
"""What Orbax and this package save alike."""


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Changes what a file of JSON holds."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def has_strings(tree: Any) -> bool:
    return any(isinstance(leaf, str) for leaf in jax.tree.leaves(tree))


def map_leaves(function: Any, tree: Any) -> Any:
    """Maps None and empty containers too."""
    return jax.tree.map(function, tree, is_leaf=trees.is_empty)


def abstract(leaf: Any) -> Any:
    """A target for a leaf: none of its data, all else of it."""
    return trees.emptied(as_orbax(leaf))


def as_orbax(leaf: Any) -> Any:
    """What Orbax reads a leaf as: it has no NumPy scalars and no complex numbers."""
    return np.asarray(leaf) if isinstance(leaf, (np.generic, complex)) else leaf


def as_nested(tree: Any) -> Any:
    """What Orbax makes of a tree without a target: dicts with texts for keys, and lists."""
    return _nested(trees.flat(tree)[0])


def _nested(leaves: list[tuple[Any, Any]]) -> Any:
    path, leaf = leaves[0]
    if not path:
        return _without_target(leaf)
    children: dict[str, list[tuple[Any, Any]]] = {}
    for (key, *rest), value in leaves:
        children.setdefault(_text(key), []).append((rest, value))
    built = {text: _nested(inner) for text, inner in children.items()}
    is_list = isinstance(path[0], (tree_util.SequenceKey, tree_util.FlattenedIndexKey))
    return list(built.values()) if is_list else built


def _text(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def _without_target(leaf: Any) -> Any:
    if isinstance(leaf, (Nothing, optax.EmptyState)):
        return None
    return {} if isinstance(leaf, Mapping) else as_orbax(leaf)


def on_first_device(leaf: Any) -> Any:
    """What lies on one device is said to lie on the first, which every reader has."""
    is_on_one = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, SingleDeviceSharding)
    return jax.device_put(leaf, jax.devices()[0]) if is_on_one else leaf


def assert_same(got: Any, want: Any) -> None:
    """Same structure, and each leaf the same to the bit, on the same devices in the same way."""
    trees.assert_same(got, want)
    for (path, one), (_, other) in zip(trees.flat(got)[0], trees.flat(want)[0], strict=True):
        if isinstance(other, jax.Array):
            assert one.sharding == other.sharding, tree_util.keystr(path)


def read_v1(path: Path, target: Any) -> Any:
    return v1.load(path, target)


def read_v1_training(path: Path, target: Any) -> Any:
    with v1.training.Checkpointer(path.parent) as checkpointer:
        latest = checkpointer.latest
        assert latest is not None
        assert latest.step == STEP
        return checkpointer.load(latest, target)


def read_v0_standard(path: Path, target: Any) -> Any:
    with v0.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "state", target)


def _pytree_restore(target: Any) -> Any:
    if target is None:
        return v0.args.PyTreeRestore()
    restore_args = checkpoint_utils.construct_restore_args(target)
    return v0.args.PyTreeRestore(item=target, restore_args=restore_args)


def read_v0_pytree(path: Path, target: Any) -> Any:
    with v0.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path / "state", args=_pytree_restore(target))


def read_v0_manager(path: Path, target: Any) -> Any:
    args = None if target is None else v0.args.Composite(state=_pytree_restore(target))
    with v0.CheckpointManager(path.parent) as manager:
        assert manager.latest_step() == STEP
        return manager.restore(STEP, args=args)["state"]


READERS: dict[str, Callable[[Path, Any], Any]] = {
    "v1": read_v1,
    "v1-training": read_v1_training,
    "v0-standard": read_v0_standard,
    "v0-pytree": read_v0_pytree,
    "v0-manager": read_v0_manager,
}
