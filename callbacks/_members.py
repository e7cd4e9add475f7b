"""The callbacks that train in a directory, and which steps each of them is to save."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import jax

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

    from flax_partial.callbacks._member import Member
    from flax_partial.callbacks._preemption import Preemption
    from flax_partial.runs.directory import AnyPath


logger = logging.getLogger(__name__)

_MOST_DECIDED = 16


class Members:
    """The callbacks whose groups the checkpoints of a run wait for.

    Attributes:
      rescued_step: The step that they save because training failed; None before.
      ended_step: The step that training ended with; None before.
      last_closed: The last step that some of them has saved; at first, the one training began at.
    """

    def __init__(
        self,
        directory: AnyPath,
        preemption: Preemption,
        lock: threading.RLock,
        *,
        skips: Callable[[int], bool],
    ) -> None:
        """Prepares it.

        Args:
          directory: The run's.
          preemption: Whether the process is to end.
          lock: The run's, which may hold it when it calls.
          skips: Whether all leave out a step that is due, if all of them may.
        """
        self.rescued_step: int | None = None
        self.ended_step: int | None = None
        self.last_closed = 0
        self._directory = directory
        self._preemption = preemption
        self._skips = skips
        self._lock = lock  # guards what follows
        self._by_key: dict[str, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        with self._lock:
            return iter(tuple(self._by_key.values()))

    def __bool__(self) -> bool:
        return bool(self._by_key)

    @property
    def keys(self) -> AbstractSet[str]:
        """The state keys of all."""
        return self._by_key.keys()

    def join(self, member: Member) -> None:
        """Has checkpoints wait for the groups of a callback that is to save them.

        Raises:
          ValueError: It and another callback keep different checkpoints.
        """
        with self._lock:
            one = member.retention
            for other in (known.retention for known in self):
                if one.removes and other.removes and one != other:
                    raise ValueError(
                        f"Two callbacks want to keep different checkpoints of {self._directory}: "
                        f"{one} and {other}. Give these options to one of them only."
                    )
            self._by_key[member.key] = member

    def remove(self, member: Member) -> None:
        """Has them wait for a callback no longer."""
        with self._lock:
            self._by_key.pop(member.key, None)

    def due(self, step: int, epoch: int, *, epoch_ends: bool) -> dict[str, Member]:
        """Returns those that are to save `step`, by key."""
        with self._lock:
            return {
                member.key: member
                for member in self
                if self.is_due(member, step, epoch, epoch_ends=epoch_ends)
            }

    def is_due(self, member: Member, step: int, epoch: int, *, epoch_ends: bool) -> bool:
        """Whether a callback is to save `step`, and has saved neither that nor a later one."""
        if step == 0:
            return member.saves_initial and member.last_saved is None
        schedule = member.schedule
        is_time = member.clock is not None and member.clock.is_due(step)  # checked at every step
        is_regular = is_time or schedule.is_step_due(step)
        is_end = epoch_ends or step == self.ended_step
        is_last = (  # of its epoch, or run: never skipped
            (epoch_ends and schedule.is_epoch_due(epoch))
            or (is_end and member.last_skipped is not None)
            or (member.saves_on_preemption and self._preemption.is_due(step))
            or (member.has_finished_step and step == self.rescued_step)
        )
        is_new = step >= self.last_closed and step != member.last_saved
        if not is_new or not (is_regular or is_last):
            return False
        if is_last or epoch_ends or not self._is_skipped(step):
            return True
        member.skip(step)
        return False

    def _is_skipped(self, step: int) -> bool:
        """Whether all callbacks leave out a step that is due: the run is behind."""
        may_skip = all(member.skips_when_behind for member in self)
        return may_skip and self._skips(step)


class Behind:
    """Decides for each step that is due whether the run is so far behind that it is skipped."""

    def __init__(self, is_behind: Callable[[], bool], timeout_secs: float) -> None:
        """Prepares it.

        Args:
          is_behind: Whether a checkpoint of this process is not finalized yet.
          timeout_secs: For how many seconds to wait for other processes.
        """
        self._is_behind = is_behind
        self._timeout_secs = timeout_secs
        self._lock = threading.Lock()  # guards what follows; held while processes agree
        # Of the last steps, by the run: a trainer may stream ahead, or train them again.
        self._decided: dict[tuple[str, int], bool] = {}

    def skips(self, step: int, name: str) -> bool:
        """Whether to skip a step; the answer is the same each time.

        Args:
          step: The step.
          name: Of the run, the same in all processes.
        """
        with self._lock:
            if (name, step) not in self._decided:
                self._decided[name, step] = self._decide(f"behind {name} {step}")
                if len(self._decided) > _MOST_DECIDED:
                    del self._decided[next(iter(self._decided))]
            return self._decided[name, step]

    def _decide(self, subject: str) -> bool:
        if jax.process_count() == 1:
            return self._is_behind()
        try:
            skips: bool = fp.agree(
                subject,
                ready=self._is_behind,
                act=lambda said: any(said.values()),
                timeout_secs=self._timeout_secs,
            )
        except Exception as error:  # noqa: BLE001 - of the service; the save, too, will report it
            logger.debug("The processes could not agree on whether to skip a step: %s", error)
            return False
        return skips
