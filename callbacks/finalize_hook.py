"""The handle that callbacks share when they save into the same checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax_partial.callbacks._copies import Copyable
from flax_partial.callbacks._runs import Runs

if TYPE_CHECKING:
    from flax_partial.callbacks._reports import CheckpointReport


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
        self.runs = Runs(timeout_secs)  # for its callbacks

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
