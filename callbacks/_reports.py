"""What each checkpoint of a run holds and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import flax_partial as fp
    from flax_partial.runs.directory import AnyPath


@dataclass(frozen=True)
class CheckpointReport:
    """One finalized checkpoint, and what it cost.

    Attributes:
      path: Where it is.
      step: Its step.
      epoch: Its epoch, the first being 0.
      saves: Group to the report of the save that wrote it, in the order in which they were saved.
      bytes: Array data, in bytes.
      reused_bytes: Array data that this process did not write: the checkpoint before holds it.
      metrics: The trainer's metrics that are stored with it.
      blocked_secs: Seconds for which hooks and streaming calls blocked training, from the first
        save of this checkpoint to that of the next.
      write_secs: Seconds spent writing groups, summed: they are written side by side, so less time
        than this went by.
      finalize_secs: Seconds that finalize took, in the background.
      finalized_at: When that was done, in seconds since the epoch.
    """

    path: AnyPath
    step: int
    epoch: int
    saves: Mapping[str, fp.SaveReport]
    bytes: int
    reused_bytes: int
    metrics: Mapping[str, float]
    blocked_secs: float
    write_secs: float
    finalize_secs: float
    finalized_at: float

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of its groups, in the order in which they were saved."""
        return tuple(self.saves)


@dataclass
class BlockedTime:
    """For how long a checkpoint has blocked training so far; it outlives the checkpoint.

    Attributes:
      step: The checkpoint's; None stands for the time before the first.
      secs: In seconds.
    """

    step: int | None = None
    secs: float = 0.0
