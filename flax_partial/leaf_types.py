"""Leaf types of others: what arrays their values are made of, and how these are built again.

A value of a registered type is replaced by its arrays before anything else looks at a tree, so that
saving, loading and the callbacks handle arrays only. It is a leaf, whether JAX takes it for one or
for a subtree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax import tree_util

from flax_partial.errors import UnsupportedLeafError

T = TypeVar("T")

_SAVED_AS_THEY_ARE = frozenset(
    (
        *(object, type(None), bool, int, float, complex, str, bytes, dict, list, tuple),
        *(np.ndarray, np.generic, jax.Array),
    )
)


@dataclass(frozen=True, slots=True)
class _LeafType:
    """What was registered for a type; see `register_leaf_type`."""

    to_arrays: Callable[[Any], Any]
    from_arrays: Callable[[Any, Any], Any]


_known: dict[type, _LeafType] = {}


def register_leaf_type(
    leaf_type: type[T],
    *,
    to_arrays: Callable[[T], Any],
    from_arrays: Callable[[T, Any], T],
) -> None:
    """Has values of a type, and of its subclasses, saved as the arrays that they are made of.

    It counts for `save`, `load` and the callbacks alike, in this process, from now on. What is on
    disk does not say that there was such a type: any reader finds the arrays, and so does `load`
    without a target. With a target that has a value of the type, `load` builds another one.

    Args:
      leaf_type: The type, such as a framework's own kind of array.
      to_arrays: From a value to what is saved in its place: mostly one `jax.Array`, or a tree of
        arrays. Of an array that is on other processes' devices it returns one without shards
        here (`jax.make_array_from_single_device_arrays` with an empty list), never None. It is
        called with values of targets, too, and may return `jax.ShapeDtypeStruct`s for these.
      from_arrays: From the target's value, and arrays as `to_arrays` returns them for it, but just
        loaded, to a new value.

    Raises:
      TypeError: It is no type.
      ValueError: The type is registered already, or is one that is saved as it is.
    """
    if not isinstance(leaf_type, type):
        raise TypeError(f"a type is registered, not {leaf_type!r}")
    name = _name_of(leaf_type)
    if leaf_type in _SAVED_AS_THEY_ARE:
        raise ValueError(f"{name} is saved as it is: register a type of your own.")
    if leaf_type in _known:
        raise ValueError(f"{name} is registered already.")
    _known[leaf_type] = _LeafType(to_arrays, from_arrays)


def are_registered() -> bool:
    """Whether there is any type to look for in a tree."""
    return bool(_known)


def unwrapped(tree: Any) -> Any:
    """Returns a tree with each value of a registered type replaced by its arrays.

    Args:
      tree: A tree that JAX can flatten.

    Raises:
      UnsupportedLeafError: The arrays of some value are None.
    """
    if not _known:
        return tree
    return tree_util.tree_map_with_path(_unwrapped, tree, is_leaf=_is_registered)


def rewrapped(tree: Any, arrays: Any) -> Any:
    """Builds the values of registered types again.

    Args:
      tree: A target.
      arrays: What was loaded for `unwrapped(tree)`.

    Returns:
      A tree like `tree`, with what was loaded.
    """
    if not _known:
        return arrays
    return jax.tree.map(_rewrapped, tree, arrays, is_leaf=_is_registered)


def advice(value: object) -> str:
    """Returns what to do about a leaf of a type that is not registered."""
    return (
        "Leaves are arrays, numbers, strings, bytes and None. Say once what arrays it is made of, "
        f"by fp.register_leaf_type({_name_of(type(value))}, to_arrays=..., from_arrays=...); or "
        "leave it out."
    )


def _find(value: object) -> _LeafType | None:
    return next((_known[base] for base in type(value).__mro__ if base in _known), None)


def _is_registered(value: object) -> bool:
    return _find(value) is not None


def _unwrapped(path: tuple[Any, ...], value: Any) -> Any:
    leaf_type = _find(value)
    if leaf_type is None:
        return value
    where = f"{_name_of(type(value))} at {tree_util.keystr(path)!r}"
    try:
        arrays = leaf_type.to_arrays(value)
    except Exception as error:
        error.add_note(f"It was raised by to_arrays, as it was registered, of the {where}.")
        raise
    if arrays is None or type(arrays) is type(value):
        raise UnsupportedLeafError(
            f"to_arrays, as it was registered, made the {where} {type(arrays).__name__}. It has to "
            "return arrays; of one that lives on other processes' devices, one without shards: "
            "jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=dtype)."
        )
    return unwrapped(arrays)


def _rewrapped(value: Any, loaded: Any) -> Any:
    leaf_type = _find(value)
    if leaf_type is None:
        return loaded
    return leaf_type.from_arrays(value, rewrapped(leaf_type.to_arrays(value), loaded))


def _name_of(leaf_type: type) -> str:
    return f"{leaf_type.__module__}.{leaf_type.__qualname__}"
