"""The handle that callbacks share when they save into the same checkpoints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flax_partial.callbacks._copies import Copyable
from flax_partial.callbacks._preemption import Preemption
from flax_partial.callbacks._run import Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flax_partial.callbacks._reports import CheckpointReport
    from flax_partial.callbacks._tiers import Tiers
    from flax_partial.runs.directory import AnyPath


class FinalizeHook(Copyable):
    """Shared by the callbacks that save into the same checkpoints: finalizes each of them once.

    Callbacks that save into one directory share one hook. It is never called by a trainer.

    Under `jax.distributed` every process has its own callbacks and hook, whose loops save at the
    same steps; each saves what its own trainer has. A checkpoint is finalized when all processes
    have saved their part of it. Where a save fails in one of them, it is given up in all.
    """

    def __init__(self, *, timeout_secs: float | None = None) -> None:
        """Prepares a hook.

        Args:
          timeout_secs: For how many seconds a checkpoint waits, in the background, for the other
            processes to save their part of it, and for a save of this process, after the one
            before it has ended; then it is given up. For as long they wait for one another where
            they recover a directory, and for others who do so, or write there. None: 90 s for
            others; for this process's saves, whose arrays may be long in coming, as long as they
            take.
        """
        if timeout_secs is not None and not timeout_secs > 0:
            raise ValueError(f"timeout_secs is a number of seconds above 0, not {timeout_secs!r}")
        self.runs = _Runs(timeout_secs)  # for its callbacks

    @property
    def reports(self) -> tuple[CheckpointReport, ...]:
        """What each checkpoint finalized so far holds and cost, in the order of finalizing."""
        reports = [report for run in self.runs for report in run.finalizer.reports]
        return tuple(sorted(reports, key=lambda report: report.finalized_at))

    def wait(self, *, show_progress: bool = False) -> None:
        """Finishes what is closed, drops what is open, and waits until nothing is under way.

        Args:
          show_progress: Show a bar of bytes if it takes longer than a second.
        """
        for run in self.runs:
            run.wait(show_progress=show_progress)


class _Runs:
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
