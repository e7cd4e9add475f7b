"""What is known of trees that were saved before, so that the next one like it costs less to save.

Trees are known by their structure. What was found out of each leaf holds for another value that is
of the same type, shape, dtype and sharding.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from msgspec import Struct

from flax_partial.format.chunks import Shape
from flax_partial.format.model import Leaf

_MOST_KNOWN_LEAVES = 1 << 17  # of the trees that are known, beside the last
_MOST_KNOWN_TREES = 1 << 9


class Like(Struct, gc=False):
    """What another value has to be in order to be described the same way.

    Attributes:
      value_type: The value's exact type.
      shape: Its shape.
      dtype: Its dtype.
      sharding: Its sharding; None for a NumPy array.
      leaf: The description; the path is that of one such value.
      shards: Positions of its shards that are written; None where its one shard is the value.
    """

    value_type: Any
    shape: Shape
    dtype: Any
    sharding: Sharding | None
    leaf: Leaf
    shards: tuple[int, ...] | None

    def fits(self, value: Any) -> bool:
        """Whether a value is described the same way, unless it is a deleted array."""
        if type(value) is not self.value_type:
            return False
        if value.shape != self.shape or value.dtype != self.dtype:
            return False
        return self.sharding is None or bool(value.sharding == self.sharding)


@dataclass(slots=True)
class KnownTree:
    """How a tree was described; all lists are as long as its leaves are many, and never change.

    Attributes:
      leaves: The descriptions.
      sizes: Size of each leaf's boxes, in bytes.
      positions: Of each leaf among the values that JAX flattens a tree to; None for what is no
        value to JAX, which is part of the structure: None, and empty containers.
      likes: What another value has to be for the description to be right again; None where each
        is to be described anew.
      text: The structure as text, where there are integer keys; else empty. To Python `1`, `True`
        and `1.0` are equal, and so are structures that have them as keys; only one can be saved.
      is_tree: Whether the leaves were claimed before: among themselves they have no conflict.
    """

    leaves: Sequence[Leaf] = ()
    sizes: Sequence[int] = ()
    positions: Sequence[int | None] = ()
    likes: Sequence[Like | None] = ()
    text: str = ""
    is_tree: bool = False
    _last: list[tuple[Any, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._last = [(None, None)] * len(self.leaves)

    def changed(self, values: Sequence[Any]) -> list[int]:
        """Finds the leaves that are to be described anew.

        Arrays that one compiled function returns have the same types and shardings, as objects,
        each time: those that fitted last are not compared.

        Args:
          values: Those of a tree of the same structure.
        """
        found = []
        last = self._last
        for number, (at, like) in enumerate(zip(self.positions, self.likes, strict=True)):
            if at is None:
                continue
            value = values[at]
            if like is None:
                fits = False
            elif like.sharding is None or type(value) is not like.value_type:
                fits = like.fits(value)
            else:
                aval, sharding = last[number]
                fits = value.aval is aval and value.sharding is sharding
                if not fits and (fits := like.fits(value)):
                    last[number] = value.aval, value.sharding
                fits = fits and not value.is_deleted()
            if not fits:
                found.append(number)
        return found


class KnownTrees:
    """Trees by structure: those that were described last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, KnownTree] = OrderedDict()
        self._leaves = 0

    def get(self, key: Any) -> KnownTree | None:
        """What is known of trees of a structure, if anything."""
        try:
            return self._known.get(key)
        except (TypeError, ValueError):  # a structure that holds what cannot be hashed or compared
            return None

    def put(self, key: Any, tree: KnownTree) -> None:
        """Keeps what is known of trees of a structure, and drops what was kept longest."""
        with self._lock:
            try:
                replaced = self._known.pop(key, None)
                self._known[key] = tree
            except (TypeError, ValueError):
                return
            self._leaves += len(tree.leaves) - (len(replaced.leaves) if replaced else 0)
            while len(self._known) > 1 and (
                self._leaves > _MOST_KNOWN_LEAVES or len(self._known) > _MOST_KNOWN_TREES
            ):
                _, dropped = self._known.popitem(last=False)
                self._leaves -= len(dropped.leaves)


def keys_on_the_way(structure: Any) -> tuple[object, ...]:
    """The keys of the dicts on the way to the first leaf, and on the way to the last.

    JAX leaves them out of the hash of a structure: without them, those of all layers of a model
    would have the same one.
    """
    found: list[object] = []
    for end in (0, -1):
        inner = structure
        while (node := inner.node_data()) is not None and (children := inner.children()):
            if node[0] is dict:
                found.append(tuple(map(str, node[1])))
            inner = children[end]
    return tuple(found)


def key_of(value: Any) -> Any:
    """What values that are `Like` each other have in common; None for what is like nothing."""
    if type(value) is np.ndarray:
        return np.ndarray, value.shape, value.dtype
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return None
    return None if value.is_deleted() else (type(value), value.shape, value.dtype, value.sharding)
