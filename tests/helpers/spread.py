"""Global arrays, of which each process has a share: made, computed, donated, compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from things import assert_sharded


def sharded(mesh: Mesh, specs: Mapping[str, PartitionSpec]) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def spread(
    values: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """Global arrays of values that every process has."""
    return {
        name: jax.make_array_from_callback(value.shape, shardings[name], value.__getitem__)
        for name, value in values.items()
    }


@jax.jit
def as_computed(tree: Any) -> Any:
    """The same values, still being computed."""
    return jax.tree.map(lambda x: x + 0, tree)


@functools.partial(jax.jit, donate_argnums=0)
def donated(tree: Any) -> Any:
    """Something else, in the memory of what it is given."""
    return jax.tree.map(lambda x: x * 0, tree)


def assert_loaded(
    loaded: Mapping[str, jax.Array],
    shardings: Mapping[str, NamedSharding],
    values: Mapping[str, np.ndarray],
) -> None:
    assert loaded.keys() == values.keys()
    for name, array in loaded.items():
        assert_sharded(array, shardings[name], values[name])
