"""Which callback saves which leaf of one step: each leaf, or row of one, is saved once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import flax_partial as fp
from flax_partial.callbacks import _rows
from flax_partial.callbacks._leaves import leaf_name

if TYPE_CHECKING:
    from flax_partial.callbacks._leaves import KeyPath, Leaves

_Claim = tuple[str, _rows.Axes, _rows.Index]
"""A leaf's name, the axes along which it is cut, and the row; both empty for the whole leaf."""


class Claims:
    """The leaves of one step that callbacks have saved; from any thread.

    A leaf belongs to the first callback that saves it: a trainer may stream every layer to all of
    them.

    Attributes:
      names: Names of the leaves.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._lock = threading.Lock()  # guards both: of two callers, one becomes the owner
        self._owners: dict[_Claim, str] = {}

    def take(self, key: str, leaves: Leaves) -> Leaves:
        """Claims leaves for a callback; returns those that no other callback has claimed."""
        with self._lock:
            owned = [leaf for leaf in leaves if self._owner(key, *leaf) == key]
            self.names.update(leaf_name(path) for path, _ in owned)
        return owned

    def already(self, key: str, leaves: Leaves) -> str | None:
        """Returns the name of a leaf that this callback has claimed before; None if of none."""
        with self._lock:
            for path, leaf in leaves:
                if any(self._owners.get(claim) == key for claim in _claims(path, leaf)):
                    return leaf_name(path)
        return None

    def covers(self, path: KeyPath, leaf: Any) -> bool:
        """Whether a leaf is claimed; of a stacked one, the row or rows that `leaf` is."""
        name = leaf_name(path)
        if not isinstance(leaf, fp.Slice | _rows.Row):
            return name in self.names
        return (name, (), ()) in self._owners or all(
            claim in self._owners for claim in _claims(path, leaf)
        )

    def _owner(self, key: str, path: KeyPath, leaf: Any) -> str:
        """Returns the callback that claimed the first row of a leaf; `key` if none did."""
        first, *others = _claims(path, leaf)
        for claim in others:
            self._owners.setdefault(claim, key)
        return self._owners.setdefault(first, key)


def _claims(path: KeyPath, leaf: Any) -> list[_Claim]:
    """Returns what of a leaf is there: some of its rows, or all of it."""
    name = leaf_name(path)
    whole: list[_Claim] = [(name, (), ())]
    if isinstance(leaf, _rows.Row):
        return [(name, leaf.axes, leaf.start)]
    if not isinstance(leaf, fp.Slice):
        return whole
    try:
        axes, rows = _rows.rows_of(leaf)
    except (TypeError, AttributeError, IndexError, ValueError):  # the save will raise what is wrong
        return whole
    return [(name, axes, row) for row in rows] or whole
