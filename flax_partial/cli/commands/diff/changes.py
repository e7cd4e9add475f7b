"""Which leaves of two tables of contents are not the same, as far as these tell. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from flax_partial.cli.commands.diff.difference import Difference
from flax_partial.format import model as kinds
from flax_partial.format.model import Leaf

ADDED, REMOVED = "added", "removed"
KIND, SHAPE, DTYPE, VALUES, UNREADABLE = "kind", "shape", "dtype", "values", "unreadable"

# Kinds that are one as to what they hold; Orbax does not tell the empty ones apart either.
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
      problem: Why they cannot be read; empty if they can.
    """

    name: str
    change: str
    a: Leaf | None = None
    b: Leaf | None = None
    difference: Difference | None = None
    problem: str = ""


def described_changes(a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> dict[str, Change]:
    """Returns the changes that show without reading, by name of the leaf."""
    found = {}
    for name in {**a, **b}:
        change = _change(a.get(name), b.get(name))
        if change:
            found[name] = Change(name, change, a.get(name), b.get(name))
    return found


def have_values_to_compare(a: Leaf, b: Leaf) -> bool:
    """Whether only reading tells if the values of two leaves are the same."""
    if not a.is_array or a.shape != b.shape or _ALIKE.get(a.kind) != _ALIKE.get(b.kind):
        return False
    return not _have_equal_digests(a, b)


def _change(a: Leaf | None, b: Leaf | None) -> str:
    if a is None or b is None:
        return REMOVED if b is None else ADDED
    if _ALIKE.get(a.kind, a.kind) != _ALIKE.get(b.kind, b.kind):
        return KIND
    if a.shape != b.shape:
        return SHAPE
    if a.dtype != b.dtype:
        return DTYPE
    return VALUES if a.text != b.text else ""


def _have_equal_digests(a: Leaf, b: Leaf) -> bool:
    if (a.dtype, a.chunk) != (b.dtype, b.chunk) or not (a.boxes and b.boxes):
        return False
    digests = a.boxes[0].digests
    return bool(digests) and all(digests) and digests == b.boxes[0].digests
