"""Which leaves of two tables of contents are not the same, as far as the tables show. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from flax_partial.cli.commands.diff.difference import Difference
from flax_partial.format import model as kinds
from flax_partial.format.model import Leaf

ADDED, REMOVED = "added", "removed"
KIND, SHAPE, DTYPE, VALUES, UNREADABLE = "kind", "shape", "dtype", "values", "unreadable"

# Kinds that hold the same; Orbax does not distinguish the empty ones either.
_ALIKE = {
    **dict.fromkeys((kinds.NUMPY_ARRAY, kinds.NUMPY_SCALAR, kinds.SCALAR), kinds.JAX_ARRAY),
    kinds.TUPLE: kinds.LIST,
    kinds.NAMED_TUPLE: kinds.NONE,
}


@dataclass(frozen=True, slots=True)
class Change:
    """A leaf that is not the same in both, A and B.

    Attributes:
      name: Its name.
      change: `added`, `removed`, `unreadable`, or the first of these in which they differ: `kind`,
        `shape`, `dtype`, `values`.
      a: The leaf in A; None where it is not there.
      b: The leaf in B; None where it is not there.
      difference: By how much the values differ; None where they were not compared.
      problem: Why they cannot be read; None if they can.
    """

    name: str
    change: str
    a: Leaf | None = None
    b: Leaf | None = None
    difference: Difference | None = None
    problem: str | None = None


def described_changes(a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> dict[str, Change]:
    """Returns the changes that show without reading, by name of the leaf."""
    pairs = {name: (a.get(name), b.get(name)) for name in {**a, **b}}
    return {
        name: Change(name, change, *pair) for name, pair in pairs.items() if (change := _how(*pair))
    }


def need_reading(a: Leaf, b: Leaf) -> bool:
    """Whether two leaves have to be read to find if, and by how much, they differ."""
    if not a.is_array or a.shape != b.shape or _ALIKE.get(a.kind) != _ALIKE.get(b.kind):
        return False
    if (a.dtype, a.chunk) != (b.dtype, b.chunk) or not (a.boxes and b.boxes):
        return True
    digests = a.boxes[0].digests
    return not (digests and all(digests) and digests == b.boxes[0].digests)


def _how(a: Leaf | None, b: Leaf | None) -> str:
    if a is None or b is None:
        return REMOVED if b is None else ADDED
    if _ALIKE.get(a.kind, a.kind) != _ALIKE.get(b.kind, b.kind):
        return KIND
    if a.shape != b.shape:
        return SHAPE
    if a.dtype != b.dtype:
        return DTYPE
    return VALUES if (a.text, a.data) != (b.text, b.data) else ""
