"""Names of leaves, and how a state is cut into the groups that are saved one by one.

A group is any subset of a tree's leaves. It is saved as one part, each leaf under the path that it
has in the whole tree; `subtree` builds what a save takes from such leaves, whatever containers they
come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jax import tree_util

KeyPath = tuple[Any, ...]
"""A path as `jax.tree_util.tree_flatten_with_path` gives it."""

GroupBy = Callable[[KeyPath], str]
"""Says, by its key path, which group a leaf of the state is saved with."""

Name = str | tuple[str | int, ...]
"""What a trainer calls a layer: its path below the root, joined with dots or as a tuple."""

Leaves = list[tuple[KeyPath, Any]]

_PARAMS = "params"


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
    """The leaves of a tree with their paths; None and empty containers in it are leaves, too."""
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
    return subtree([((tree_util.DictKey(root), *map(_entry, _keys(name))), tree)])


def group_name(root: str, name: Name) -> str:
    """What a streamed group is called: the name that all its leaves begin with."""
    return ".".join((root, *map(str, _keys(name))))


def _keys(name: Name) -> tuple[str | int, ...]:
    if isinstance(name, tuple):
        return name
    return tuple(name.split(".")) if name else ()


def _entry(key: str | int) -> Any:
    return tree_util.SequenceKey(key) if isinstance(key, int) else tree_util.DictKey(key)


def texts(path: KeyPath) -> tuple[str, ...]:
    """A path's keys as text, as they stand in the leaf's name."""
    return tuple(map(_text, path))


def _text(key: Any) -> str:
    if type(key) is tree_util.DictKey:  # by far the most common, and cheaper than the general case
        return str(key.key)
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaf_name(path: KeyPath) -> str:
    """The name that a leaf has in a checkpoint: its keys, joined with a dot."""
    return ".".join(texts(path))


def innermost(names: tuple[str, ...], stacks: Iterable[str]) -> str | None:
    """The longest of `stacks`, names of leaves or subtrees, that a path is or lies below."""
    name = ".".join(names)
    above = [stack for stack in stacks if name == stack or name.startswith(f"{stack}.")]
    return max(above, key=len, default=None)


def cut(leaves: Leaves, group_by: GroupBy) -> dict[str, Leaves]:
    """Sorts leaves into groups, both in the order in which they come."""
    groups: dict[str, Leaves] = {}
    for path, leaf in leaves:
        groups.setdefault(group_by(path), []).append((path, leaf))
    return groups


def layerwise(leaves: Leaves, stacks: Iterable[str] = ()) -> GroupBy:
    """The default grouping of a state: a group for each layer of each root ("params", ...).

    A layer reaches down to the first number of the path (`params.blocks.3`), or else to the first
    key below the root (`params.embed`); each subtree of `stacks` is a layer, too. A leaf that has
    a parameter's path at the end of its own, as Optax's moments have, belongs to that parameter's
    layer: `opt_state.0.mu.blocks.3.kernel` is grouped as `opt_state.blocks.3`, with its second
    moment.
    """
    known = list(stacks)
    params = {
        names[1:]: _layer(names, known)
        for names in _paths_of(leaves)
        if names[0] == _PARAMS or innermost(names, known) is not None
    }

    def group_by(path: KeyPath) -> str:
        names = texts(path)
        if names and names[0] != _PARAMS and innermost(names, known) is None:
            for start in range(1, len(names)):
                layer = params.get(names[start:])
                if layer is not None:
                    return ".".join((names[0], *layer[1:]))
        return ".".join(_layer(names, known))

    return group_by


def _paths_of(leaves: Leaves) -> Iterable[tuple[str, ...]]:
    return (texts(path) for path, _ in leaves if path)


def _layer(names: tuple[str, ...], stacks: Iterable[str]) -> tuple[str, ...]:
    stack = innermost(names, stacks)
    if stack is not None:
        return tuple(stack.split("."))
    number = next((at for at, name in enumerate(names) if at and name.isdecimal()), 1)
    return names[: number + 1]
