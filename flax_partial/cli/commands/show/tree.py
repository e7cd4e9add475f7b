"""The tree that a checkpoint's leaves form, and its lines as `tree` draws them. Pure.

Not by `rich.tree`, which draws a tree of its own, not the first column of a table, and is slow.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flax_partial.format.model import Leaf

# What stands before a key: to its node, to the last node, past a node, past the last node.
_GUIDES = ("├── ", "└── ", "│   ", "    ")
_ASCII_GUIDES = ("|-- ", "`-- ", "|   ", "    ")


@dataclass(slots=True)
class Node:
    """A leaf or a subtree.

    Attributes:
      leaf: The leaf; None where it is a subtree.
      children: Key -> subtree or leaf, in the order of the leaves.
      bytes: Array data in it, in bytes.
      leaves: Number of leaves in it.
      dtypes: Names of the dtypes in it.
    """

    leaf: Leaf | None = None
    children: dict[str, "Node"] = field(default_factory=dict)
    bytes: int = 0
    leaves: int = 0
    dtypes: set[str] = field(default_factory=set)


def build(leaves: Iterable[Leaf]) -> Node:
    """Builds the tree; its root is a leaf if that is all there is."""
    root = Node()
    for leaf in leaves:
        nodes = [root]
        for key in leaf.texts:
            nodes.append(nodes[-1].children.setdefault(key, Node()))
        nodes[-1].leaf = leaf
        for node in nodes:
            node.bytes += leaf.bytes
            node.leaves += 1
            node.dtypes |= {leaf.dtype} - {""}
    return root


def lines(root: Node, depth: int | None = None) -> Iterator[tuple[str, str, Node]]:
    """Yields each line's guide (`│   ├── `), its key, and its node; the root has none.

    Args:
      root: The whole tree.
      depth: How many levels to go down; None for all.
    """
    child, last, past_child, past_last = _guides()
    stack = _last_first(root, "")
    while stack:
        before, key, node, is_last = stack.pop()
        yield before + (last if is_last else child), key, node
        level = len(before) // len(child) + 1
        if depth is None or level < depth:
            stack += _last_first(node, before + (past_last if is_last else past_child))


def _last_first(node: Node, before: str) -> list[tuple[str, str, Node, bool]]:
    children = list(node.children.items())
    last = len(children) - 1
    return [(before, key, child, i == last) for i, (key, child) in enumerate(children)][::-1]


def _guides() -> tuple[str, str, str, str]:
    """Returns those that standard output can show."""
    try:
        "".join(_GUIDES).encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return _ASCII_GUIDES
    return _GUIDES
