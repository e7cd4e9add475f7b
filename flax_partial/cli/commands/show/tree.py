"""The tree that a checkpoint's leaves form, and its lines as `tree` draws them. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flax_partial.format.model import Leaf


@dataclass(frozen=True, slots=True)
class Guides:
    """What is drawn before a key: to its node, and, below that, past it; all of one width."""

    child: str
    last: str
    line: str
    past: str = "    "


LINES = Guides("├── ", "└── ", "│   ")
ASCII = Guides("|-- ", "`-- ", "|   ")  # where the output's encoding has no lines


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
        node = root
        _count(node, leaf)
        for key in leaf.path.texts:
            node = node.children.setdefault(key, Node())
            _count(node, leaf)
        node.leaf = leaf
    return root


def _count(node: Node, leaf: Leaf) -> None:
    node.bytes += leaf.bytes
    node.leaves += 1
    if leaf.dtype:
        node.dtypes.add(leaf.dtype)


def lines(root: Node, depth: int | None, guides: Guides) -> Iterator[tuple[str, str, Node]]:
    """Yields each line's guide (`│   ├── `), its key, and what it stands for; the root has none.

    Args:
      root: The whole tree.
      depth: How many levels to go down; None for all.
      guides: How to draw it.
    """
    stack = _last_first(root, "") if depth != 0 else []
    while stack:
        before, key, node, is_last = stack.pop()
        yield before + (guides.last if is_last else guides.child), key, node
        level = len(before) // len(guides.last) + 1
        if depth is None or level < depth:
            stack.extend(_last_first(node, before + (guides.past if is_last else guides.line)))


def _last_first(node: Node, before: str) -> list[tuple[str, str, Node, bool]]:
    children = list(node.children.items())
    last = len(children) - 1
    return [(before, key, child, i == last) for i, (key, child) in enumerate(children)][::-1]
