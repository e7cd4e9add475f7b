"""Leaves of a state: their paths and names.

Whatever is saved at once is a subset of a state's leaves, each under the path that it has in the
whole tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from jax import tree_util

from flax_partial.errors import first_few

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


def unrestored(names: Iterable[str], target: Leaves) -> str:
    """Returns which subtrees a target has nothing of, and how many leaves each has.

    Args:
      names: The names of the checkpoint's leaves.
      target: The leaves that were loaded, by the same names.

    Returns:
      Such as "opt_state (6 leaves), params.head (2 leaves)"; "" if everything was taken.
    """
    taken = {leaf_name(path) for path, _ in target}
    touched = {name[:at] for name in taken for at in _ends(name)}
    counts: Counter[str] = Counter()
    for name in names:
        if name not in taken:
            root = next((name[:at] for at in _ends(name) if name[:at] not in touched), name)
            counts[root] += 1
    said = [f"{root} ({n} {'leaf' if n == 1 else 'leaves'})" for root, n in sorted(counts.items())]
    return ", ".join(first_few(said, most=5, count=len(said)))


def _ends(name: str) -> list[int]:
    """Where a name's keys end."""
    return [at for at, character in enumerate(name) if character == "."] + [len(name)]
