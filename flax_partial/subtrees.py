"""Trees of which only some leaves are there, each at the path that it has in the whole tree."""

from collections.abc import Iterable
from typing import Any

from jax import tree_util

Name = str | tuple[Any, ...]
"""Path of a subtree: keys joined with dots, or a tuple of keys, in which an integer is an index."""


@tree_util.register_pytree_with_keys_class
class Branch:
    """A node of a tree of which only some leaves are there: lists with gaps keep their indices."""

    __slots__ = ("children",)

    def __init__(self, children: dict[Any, Any] | None = None) -> None:
        self.children: dict[Any, Any] = children or {}

    def __repr__(self) -> str:
        return f"Branch({self.children})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        """Gives JAX the children with the keys they have in the whole tree."""
        return tuple(self.children.items()), tuple(self.children)

    @classmethod
    def tree_unflatten(cls, keys: tuple[Any, ...], children: Iterable[Any]) -> "Branch":
        """Builds the node again, as `jax.tree.map` does."""
        return cls(dict(zip(keys, children, strict=True)))


def subtree(path: Name, tree: Any) -> Any:
    """Puts a tree where it stands in a larger one, of which nothing else is there.

    So a part of what no smaller tree can say can be saved by itself: an element of a list, a field
    of a named tuple, a layer's moments: `save(path, subtree(("opt_state", 0, "mu"), moments))`.

    Args:
      path: The way from the root: keys of dicts and names of fields as text, indices of lists and
        tuples as integers; keys of `jax.tree_util` paths are taken as they are. Text alone stands
        for the keys that it joins with dots.
      tree: What is there.

    Raises:
      TypeError: A key is nothing of that.
    """
    return joined([(tuple(map(_key, keys_of(path))), tree)])


def joined(leaves: Iterable[tuple[tuple[Any, ...], Any]]) -> Any:
    """Builds the tree that has only these leaves (or subtrees), each at its own JAX key path."""
    root = Branch()
    for path, leaf in leaves:
        if not path:
            return leaf
        node = root
        for key in path[:-1]:
            node = node.children.setdefault(key, Branch())
        node.children[path[-1]] = leaf
    return root


def keys_of(name: Name) -> tuple[Any, ...]:
    """Splits a path into its keys."""
    if isinstance(name, tuple):
        return name
    if isinstance(name, str):
        return tuple(name.split(".")) if name else ()
    raise TypeError(f"a path is text or a tuple of keys, not {name!r}")


def _key(key: Any) -> Any:
    if isinstance(key, _JAX_KEYS):
        return key
    if isinstance(key, str):
        return tree_util.DictKey(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return tree_util.SequenceKey(key)
    raise TypeError(f"a key is text, an integer, or one of jax.tree_util's, not {key!r}")


_JAX_KEYS = (
    tree_util.DictKey,
    tree_util.SequenceKey,
    tree_util.GetAttrKey,
    tree_util.FlattenedIndexKey,
)
