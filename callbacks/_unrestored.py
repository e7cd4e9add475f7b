"""What of a checkpoint a target did not take: a user who did not mean that should learn of it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flax_partial.callbacks._leaves import texts
from flax_partial.errors import first_few

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flax_partial.callbacks._leaves import Leaves

_SHOWN = 5


def unrestored(names: Iterable[str], target: Leaves) -> str:
    """Returns which subtrees a target has nothing of, and how many leaves each has.

    Args:
      names: The names of the checkpoint's leaves.
      target: The leaves that were loaded, by the same names.

    Returns:
      Such as "opt_state (6 leaves), params.head (2 leaves)"; "" if everything was taken.
    """
    taken = {".".join(texts(path)) for path, _ in target}
    touched = {name[:at] for name in taken for at in _ends(name)}
    counts: Counter[str] = Counter()
    for name in names:
        if name not in taken:
            root = next((name[:at] for at in _ends(name) if name[:at] not in touched), name)
            counts[root] += 1
    said = [f"{root} ({n} {'leaf' if n == 1 else 'leaves'})" for root, n in sorted(counts.items())]
    return ", ".join(first_few(said, most=_SHOWN, count=len(said)))


def _ends(name: str) -> list[int]:
    """Where a name's keys end."""
    return [at for at, character in enumerate(name) if character == "."] + [len(name)]
