"""Leaves of a state: their paths and names.

Whatever is saved at once is a subset of a state's leaves, each under the path that it has in the
whole tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax import tree_util

KeyPath = tuple[Any, ...]
"""A path as `jax.tree_util.tree_flatten_with_path` gives it."""

Leaves = list[tuple[KeyPath, Any]]


def flatten(tree: Any) -> Leaves:
    """Returns the leaves of a tree with their paths; None and empty containers are leaves, too."""
    if _is_leaf(tree):
        return []
    return tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]


def _is_leaf(node: Any) -> bool:
    return node is None or (isinstance(node, list | tuple | Mapping) and not node)


def texts(path: KeyPath) -> tuple[str, ...]:
    """Returns a path's keys as text, as they stand in the leaf's name."""
    return tuple(map(_text, path))


def _text(key: Any) -> str:
    if type(key) is tree_util.DictKey:  # by far the most common, and cheaper than the general case
        return key.key if type(key.key) is str else _plain(key.key)
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return _plain(getattr(key, attribute))
    return str(key)


def _plain(key: Any) -> str:
    """A key's text as a save has it: a member of an enum is what it equals."""
    if isinstance(key, str):
        return str.__str__(key)
    return str(int(key)) if isinstance(key, int) else str(key)


def leaf_name(path: KeyPath) -> str:
    """Returns the name that a leaf has in a checkpoint: its keys, joined with a dot."""
    return ".".join(texts(path))


def innermost(names: tuple[str, ...], stacks: Iterable[str]) -> str | None:
    """Returns the longest of `stacks`, names of leaves or subtrees, that holds a path."""
    name = ".".join(names)
    above = [stack for stack in stacks if name == stack or name.startswith(f"{stack}.")]
    return max(above, key=len, default=None)
