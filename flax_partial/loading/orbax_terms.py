"""Targets in Orbax's terms: what its `metadata` returns, types instead of values, `...`.

Nothing of Orbax is imported: its objects are recognised by their module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from flax_partial.errors import TargetMismatchError
from flax_partial.format import model as kinds
from flax_partial.format.model import Leaf
from flax_partial.loading import target as placing

PLACEHOLDER = ...
"""Stands in a target for a leaf or a subtree that is not to be read."""

_NO_SHARDING = object()  # what describes an array of NumPy's has none
_OF_TYPES: Mapping[type, Any] = {
    bool: False,
    int: 0,
    float: 0.0,
    complex: 0j,
    str: "",
    bytes: b"",
}


def tree_of(target: Any) -> Any:
    """Returns the tree in what Orbax's `metadata` returned: v1's, or that of a v0 step or item."""
    if not _is_of_orbax(target):
        return target
    if isinstance(target, Mapping):  # items; None where Orbax does not describe one
        return {name: tree_of(item) for name, item in target.items() if item is not None}
    for attribute in ("metadata", "item_metadata", "tree"):
        if hasattr(target, attribute):
            return tree_of(getattr(target, attribute))
    return target


def as_value(leaf: Leaf, target: Any) -> Any:
    """Returns what stands for a leaf of a target in our own terms: a value, or an abstract array.

    Raises:
      TargetMismatchError: The devices that it was saved from are not here.
    """
    if isinstance(target, type):
        return _of_type(leaf, target)
    if not _is_of_orbax(target) or isinstance(target, tuple):  # its own empty named tuple
        return target
    if not hasattr(target, "dtype"):  # Orbax gives a string no dtype
        return ""
    if leaf.kind == kinds.SCALAR:
        return np.zeros((), leaf.numpy_dtype).item()
    try:
        sharding = getattr(target, "sharding", _NO_SHARDING)
        if hasattr(sharding, "to_jax_sharding"):
            sharding = sharding.to_jax_sharding()
    except ValueError as error:
        raise TargetMismatchError(
            f"{leaf.name!r}: its sharding in the target cannot be made here: {error}"
        ) from error
    if leaf.kind == kinds.NUMPY_ARRAY or sharding is _NO_SHARDING:
        return _numpy(target.shape, target.dtype)
    return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding)


def _of_type(leaf: Leaf, wanted: type) -> Any:
    if leaf.is_array and issubclass(wanted, (np.ndarray, jax.Array, jax.ShapeDtypeStruct)):
        is_numpy = issubclass(wanted, np.ndarray)
        return _numpy(leaf.shape, leaf.dtype) if is_numpy else placing.abstract(leaf)
    return _OF_TYPES.get(wanted, wanted)


def _numpy(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _is_of_orbax(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "orbax"
