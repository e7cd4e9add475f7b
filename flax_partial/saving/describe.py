"""A state -> its leaves, and where the data of their boxes is; touches no data, waits for nothing.

How a tree was described is remembered by its structure: the next save of a tree like it only
compares each leaf's type, shape, dtype and sharding.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from msgspec import structs

from flax_partial import collector, leaf_types
from flax_partial.distributed import agreement
from flax_partial.format import keypaths
from flax_partial.format import model as kinds
from flax_partial.format.keypaths import KeyPath, is_leaf
from flax_partial.format.model import Leaf
from flax_partial.saving.describe_leaf import How, Source, describe_leaf, shards_written
from flax_partial.saving.known_trees import (
    KnownTree,
    KnownTrees,
    Like,
    Template,
    is_like,
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
    leaves: list[Leaf] = field(default_factory=list)
    sources: list[Sequence[Source]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    arrays: "Sequence[weakref.ref[jax.Array] | None]" = ()

    def add(self, leaf: Leaf, sources: Sequence[Source], size: int) -> None:
        """Adds a leaf, the data of its boxes, and their size in bytes."""
        self.leaves.append(leaf)
        self.sources.append(sources)
        self.sizes.append(size)


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
        with collector.paused():
            described = _anew(state, how)
        if any(keypaths.INT_KEY in one.leaf.key_kinds for one in described.tree.templates):
            described.tree.text = str(structure)
        _known_trees.put(key, described.tree)
    else:
        described = _again(tree, values, how)
    if remember:
        described.arrays = [
            None if one.at is None else _lasting(values[one.at]) for one in described.tree.templates
        ]
    return described


def _anew(state: Any, how: How) -> Described:
    described = Described(KnownTree())
    paths, values, _ = keypaths.flatten(state)
    if len(paths) == 1 and not paths[0].texts and is_leaf(values[0]):
        return described
    likes: dict[Any, Like] = {}
    depends_on_name = how[2] and agreement.count() > 1  # who writes what processes share
    count = 0
    for path, value in zip(paths, values, strict=True):
        at = None if is_leaf(value) else count
        count += at is not None
        key = None if depends_on_name else key_of(value)
        like = likes.get(key)
        if like is None:
            template = _add(described, path, value, at, how)
            if template.like is not None and key is not None:
                likes[key] = template.like
        else:
            leaf = structs.replace(like.leaf, texts=path.texts, key_kinds=path.key_kinds)
            described.add(leaf, _sources_of(value, like), like.size)
            template = Template(leaf, at, like)
        described.tree.templates.append(template)
    return described


def _again(tree: KnownTree, values: Sequence[Any], how: How) -> Described:
    described = Described(tree)
    for number, one in enumerate(tree.templates):
        value = None if one.at is None else values[one.at]
        if one.like is not None and is_like(value, one.like):
            described.add(one.leaf, _sources_of(value, one.like), one.like.size)
        elif one.at is None:
            described.add(one.leaf, (), 0)
        else:
            tree.templates[number] = _add(described, one.leaf, value, one.at, how)
    return described


def _sources_of(value: Any, like: Like) -> Sequence[Source]:
    if like.shards is None:
        return (value,)
    return [value.addressable_data(shard) for shard in like.shards]


def _add(
    described: Described,
    path: KeyPath,
    value: Any,
    at: int | None,
    how: How,
) -> Template:
    """Describes a leaf; returns what is to be remembered of it."""
    leaf, sources = describe_leaf(path, value, how)
    size = sum(source.nbytes for source in sources)
    described.add(leaf, sources, size)
    sharding = shards = None
    if leaf.kind == kinds.JAX_ARRAY and isinstance(value, jax.Array):
        sharding = value.sharding
        if not isinstance(sharding, SingleDeviceSharding):
            shards = shards_written(path, value, how)
            if shards is None:
                return Template(leaf, at, None)
    elif type(value) is not np.ndarray or not value.dtype.isnative:
        return Template(leaf, at, None)
    like = Like(type(value), value.shape, value.dtype, sharding, leaf, shards, size)
    return Template(leaf, at, like)


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
