"""The runs of the callbacks that share a hook."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flax_partial.callbacks._preemption import Preemption
from flax_partial.callbacks._run import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flax_partial.callbacks._tiers import Tiers
    from flax_partial.runs.directory import AnyPath


class Runs:
    """The runs of the callbacks that share a hook, one for each of their directories.

    Attributes:
      preemption: Whether they are to save for the last time; all decide alike.
    """

    def __init__(self, timeout_secs: float | None) -> None:
        self.preemption = Preemption()
        self._timeout_secs = timeout_secs
        self._by_directory: dict[AnyPath, Run] = {}
        self._keys: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Run]:
        return iter(tuple(self._by_directory.values()))

    def of(self, directory: AnyPath, tiers: Tiers | None = None) -> Run:
        """Returns the run of a directory, which is new if this is its first callback.

        Args:
          directory: The directory; with `tiers`, that of the local tier.
          tiers: The uploads from it, if there are any.

        Raises:
          ValueError: Another callback uploads from there to elsewhere, or not at all.
        """
        run = self._by_directory.get(directory)
        if run is None:
            run = Run(directory, self.preemption, self._timeout_secs, tiers)
            self._by_directory[directory] = run
        elif run.places != ((directory,) if tiers is None else (directory, tiers.remote)):
            raise ValueError(
                f"Another callback saves into {run.places[-1]} by way of {directory}: give all "
                "callbacks of a hook the same directory and local=."
            )
        return run

    def unique_key(self, key: str) -> str:
        """Makes a state key differ from those of the callbacks made before."""
        self._keys[key] += 1
        return key if self._keys[key] == 1 else f"{key}#{self._keys[key]}"
