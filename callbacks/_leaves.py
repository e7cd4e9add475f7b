"""Leaves of a state: their paths and names, and trees that hold only some of them.

Whatever is saved at once is a subset of a state's leaves, each under the path that it has in the
whole tree; `subtree` builds what a save takes from such leaves, whatever containers they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax import tree_util

KeyPath = tuple[Any, ...]
"""A path as `jax.tree_util.tree_flatten_with_path` gives it."""

Leaves = list[tuple[KeyPath, Any]]

Name = str | tuple[str | int, ...]
"""What a trainer calls a layer: its path below the root, joined with dots or as a tuple."""


@tree_util.register_pytree_with_keys_class
class Branch:
    """A node of a tree of which only some leaves are there: lists with gaps keep their indices."""

    __slots__ = ("children",)

    def __init__(self, children: dict[Any, Any] | None = None) -> None:
        self.children: dict[Any, Any] = children or {}

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        """Gives JAX the children with the keys they have in the whole tree."""
        return tuple(self.children.items()), tuple(self.children)

    @classmethod
    def tree_unflatten(cls, keys: tuple[Any, ...], children: Iterable[Any]) -> Branch:
        """Builds the node again, as `jax.tree.map` does."""
        return cls(dict(zip(keys, children, strict=True)))


def flatten(tree: Any) -> Leaves:
    """Returns the leaves of a tree with their paths; None and empty containers are leaves, too."""
    if _is_leaf(tree):
        return []
    return tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]


def _is_leaf(node: Any) -> bool:
    return node is None or (isinstance(node, list | tuple | Mapping) and not node)


def subtree(leaves: Iterable[tuple[KeyPath, Any]]) -> Any:
    """Builds the tree that has only these leaves (or subtrees), each at its own path."""
    root = Branch()
    for path, leaf in leaves:
        if not path:
            return leaf
        node = root
        for key in path[:-1]:
            node = node.children.setdefault(key, Branch())
        node.children[path[-1]] = leaf
    return root


def placed(root: str, name: Name, tree: Any) -> Any:
    """Puts a streamed tree where it belongs in the whole state.

    Args:
      root: Key of the state that holds it: "params" or "opt_state".
      name: Path below `root`: "blocks.3", or a tuple of keys, in which an integer is an index of a
        list. Empty: `tree` is all that `root` holds.
      tree: The layer's parameters, or their optimizer state.
    """
    entries = (
        tree_util.SequenceKey(key) if isinstance(key, int) else tree_util.DictKey(key)
        for key in keys_of(name)
    )
    return subtree([((tree_util.DictKey(root), *entries), tree)])


def keys_of(name: Name) -> tuple[str | int, ...]:
    """Splits a layer's name into its keys."""
    if isinstance(name, tuple):
        return name
    return tuple(name.split(".")) if name else ()


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
