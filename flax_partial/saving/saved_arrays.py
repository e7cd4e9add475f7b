"""Arrays that were saved and still are on a device: what their parts hold, without copying them.

A `jax.Array` never changes, so that one that was saved holds, as long as it exists, what its part
on the disk holds. It is recognised as the very same object. Objects are referenced weakly, and
dropped when they are freed: a later one may get the same `id`.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax_partial.format.model import Leaf
from flax_partial.saving.reuse import DataFile, Shared, form_of, plan_of


@dataclass(frozen=True, slots=True)
class _Saved:
    """One array: as a leaf with digests and places, and the data file that these are of."""

    array: "weakref.ref[Any]"
    checkpoint: Path
    file: DataFile
    leaf: Leaf


class SavedArrays:
    """What this process remembers of arrays; may be used by several threads at once."""

    def __init__(self) -> None:
        self._saved: dict[int, _Saved] = {}

    def remember(
        self, array: "weakref.ref[Any]", *, checkpoint: Path, file: DataFile, leaf: Leaf
    ) -> None:
        """Records an array that a committed part holds.

        Args:
          array: The array; one that is freed by now is not recorded.
          checkpoint: The checkpoint that the part belongs to.
          file: The data file that holds it, at its place in the finalized checkpoint.
          leaf: What it was saved as, with digests and places.
        """
        value = array()
        if value is None:
            return
        key = id(value)
        own = weakref.ref(value, lambda dead: self._forget(key, dead))
        self._saved[key] = _Saved(own, checkpoint, file, leaf)

    def _forget(self, key: int, dead: "weakref.ref[Any]") -> None:
        saved = self._saved.get(key)
        if saved is not None and saved.array is dead:
            self._saved.pop(key, None)

    def shared_with(
        self,
        checkpoint: Path,
        arrays: Sequence["weakref.ref[Any] | None"],
        leaves: Sequence[Leaf],
        *,
        durable: bool,
    ) -> tuple[Shared, ...]:
        """Finds the files of a checkpoint that hold some of these arrays, and are worth a link.

        Args:
          checkpoint: The checkpoint.
          arrays: What is to be saved; None for what is never remembered.
          leaves: As what each of them is to be saved.
          durable: Whether only files count that are on the disk for certain.
        """
        found: dict[DataFile, dict[int, Leaf]] = {}
        for position, (array, leaf) in enumerate(zip(arrays, leaves, strict=True)):
            saved = self._of(array)
            if saved is None or saved.checkpoint != checkpoint:
                continue
            is_on_disk = saved.file.durable or not durable
            if is_on_disk and _extent(saved.leaf) == _extent(leaf):
                placed = leaf.with_boxes(saved.leaf.boxes)
                found.setdefault(saved.file, {})[position] = placed
        return plan_of(found).shared

    def _of(self, array: "weakref.ref[Any] | None") -> _Saved | None:
        value = None if array is None else array()
        saved = None if value is None else self._saved.get(id(value))
        return saved if saved is not None and saved.array() is value else None


def _extent(leaf: Leaf) -> tuple[object, ...]:
    """What two leaves agree on that are the same boxes of one array, stored the same way."""
    return form_of(leaf), [(box.start, box.shape) for box in leaf.boxes]
