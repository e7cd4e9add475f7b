"""A state -> its leaves, and where the data of their boxes is; touches no data, waits for nothing.

How a tree was described is remembered by its structure: the next save of a tree like it only
compares each leaf's type, shape, dtype and sharding.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from msgspec import structs

from flax_partial import leaf_types
from flax_partial.distributed import agreement
from flax_partial.format import keypaths
from flax_partial.format import model as kinds
from flax_partial.format.keypaths import is_leaf
from flax_partial.format.model import Leaf
from flax_partial.saving.describe_leaf import How, Source, describe_leaf, shards_written
from flax_partial.saving.known_trees import (
    KnownTree,
    KnownTrees,
    Like,
    key_of,
    keys_on_the_way,
)

_known_trees = KnownTrees()


@dataclass(slots=True)
class Described:
    """The leaves of a state, in order.

    Attributes:
      tree: What is known of trees like it.
      leaves: What each is, with the boxes that this process has to write, without digests.
      sources: The data of each leaf's boxes: host arrays, or arrays on a single device.
      sizes: Size of each leaf's boxes, in bytes.
      arrays: Weak references to those leaves that nothing can change as long as they exist.
    """

    tree: KnownTree
    leaves: Sequence[Leaf]
    sources: Sequence[Sequence[Source]]
    sizes: Sequence[int]
    arrays: "Sequence[weakref.ref[jax.Array] | None]" = ()


def describe(
    state: Any,
    *,
    chunk_bytes: int,
    compression: str | None,
    share_replicas: bool = False,
    remember: bool = False,
) -> Described:
    """Describes how a state is stored.

    Args:
      state: Any pytree of what can be saved.
      chunk_bytes: Wanted size of a chunk, in bytes.
      compression: Codec of the chunks.
      share_replicas: Whether all processes that hold replicas of an array save it, each its share;
        else the process of replica 0 saves it.
      remember: Whether to refer to arrays that live on, weakly.

    Raises:
      UnsupportedLeafError: No checkpoint can hold some leaf or key.
    """
    values, structure = keypaths.values_of(state)
    if leaf_types.are_registered():
        state = leaf_types.unwrapped(state)
        values, structure = keypaths.values_of(state)
    how = chunk_bytes, compression, share_replicas
    key = keys_on_the_way(structure), structure, how, agreement.count()
    tree = _known_trees.get(key)
    if tree is None or (tree.text and tree.text != str(structure)):
        described = _anew(state, how)
        if any(keypaths.INT_KEY in leaf.key_kinds for leaf in described.leaves):
            described.tree.text = str(structure)
    else:
        described = _again(tree, values, how)
    if described.tree is not tree:
        _known_trees.put(key, described.tree)
    if remember:
        described.arrays = [
            None if at is None else _lasting(values[at]) for at in described.tree.positions
        ]
    return described


def _anew(state: Any, how: How) -> Described:
    paths, values, _ = keypaths.flatten(state)
    if len(paths) == 1 and not paths[0].texts and is_leaf(values[0]):
        return Described(KnownTree(), (), (), ())
    leaves: list[Leaf] = []
    sources: list[Sequence[Source]] = []
    likes: list[Like | None] = []
    positions: list[int | None] = []
    known: dict[Any, Like] = {}
    depends_on_name = how[2] and agreement.count() > 1  # who writes what processes share
    count = 0
    for path, value in zip(paths, values, strict=True):
        positions.append(None if is_leaf(value) else count)
        count += positions[-1] is not None
        key = None if depends_on_name else key_of(value)
        like = known.get(key)
        if like is None:
            leaf, of_leaf = describe_leaf(path, value, how)
            like = _like(leaf, value, how)
            if like is not None and key is not None:
                known[key] = like
        else:
            leaf = structs.replace(like.leaf, texts=path.texts, key_kinds=path.key_kinds)
            of_leaf = _sources_of(value, like)
        leaves.append(leaf)
        sources.append(of_leaf)
        likes.append(like)
    sizes = [sum(source.nbytes for source in of_leaf) for of_leaf in sources]
    return Described(KnownTree(leaves, sizes, positions, likes), leaves, sources, sizes)


def _again(tree: KnownTree, values: Sequence[Any], how: How) -> Described:
    changed = tree.changed(values)
    likes = [*tree.likes]
    for number in changed:
        likes[number] = None
    sources = [
        () if at is None or like is None else _sources_of(values[at], like)
        for at, like in zip(tree.positions, likes, strict=True)
    ]
    if not changed:
        return Described(tree, tree.leaves, sources, tree.sizes)
    leaves, sizes = [*tree.leaves], [*tree.sizes]
    for number in changed:
        at = tree.positions[number]
        value = None if at is None else values[at]
        leaves[number], sources[number] = describe_leaf(tree.leaves[number], value, how)
        sizes[number] = sum(source.nbytes for source in sources[number])
        likes[number] = _like(leaves[number], value, how)
    if any(likes[number] is not None for number in changed):
        tree = KnownTree(leaves, sizes, tree.positions, likes, tree.text, tree.is_tree)
    return Described(tree, leaves, sources, sizes)


def _sources_of(value: Any, like: Like) -> Sequence[Source]:
    if like.shards is None:
        return (value,)
    return [value.addressable_data(shard) for shard in like.shards]


def _like(leaf: Leaf, value: Any, how: How) -> Like | None:
    """What another value has to be to be described as this one was; None where none can be."""
    sharding = shards = None
    if leaf.kind == kinds.JAX_ARRAY and isinstance(value, jax.Array):
        sharding = value.sharding
        if not (isinstance(sharding, SingleDeviceSharding) and value.is_fully_addressable):
            shards = shards_written(leaf, value, how)
            if shards is None:
                return None
    elif type(value) is not np.ndarray or not value.dtype.isnative:
        return None
    return Like(type(value), value.shape, value.dtype, sharding, leaf, shards)


def _lasting(value: object) -> "weakref.ref[jax.Array] | None":
    """Refers to an array that nothing can change as long as it exists; None for any other leaf."""
    if isinstance(value, jax.Array) and _is_on_accelerator(value.sharding):
        return weakref.ref(value)
    return None


@lru_cache(maxsize=1024)
def _is_on_accelerator(sharding: Sharding) -> bool:
    """Whether memory is an array's alone: on a CPU it may be that of a NumPy array, and change."""
    devices: set[Any] = sharding.device_set
    return all(device.platform != "cpu" for device in devices)
