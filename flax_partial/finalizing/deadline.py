"""Until when a call waits: for this process's saves, for those of others, and for leaves."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

from flax_partial.errors import CheckpointInUseError, IncompleteCheckpointError
from flax_partial.sessions.registry import Session
from flax_partial.sessions.workers import Task
from flax_partial.storage.place import Place

_LOG = logging.getLogger("flax_partial")
_FIRST_PAUSE_SECS = 0.01
_LONGEST_PAUSE_SECS = 0.1
_PATIENCE_SECS = 1.0  # after which a wait for other processes is logged


def check_timeout(timeout_secs: float | None) -> None:
    """Raises ValueError for what is no number of seconds."""
    if timeout_secs is not None and not timeout_secs >= 0:
        raise ValueError(f"timeout_secs is a number of seconds, 0 or more, not {timeout_secs!r}")


class Deadline:
    """One deadline for all that a call waits for; an interrupt of the caller ends every wait."""

    def __init__(
        self,
        task: Task[Any],
        timeout_secs: float | None,
        error: type[IncompleteCheckpointError | CheckpointInUseError],
    ) -> None:
        """Begins to count.

        Args:
          task: What a worker does for the caller.
          timeout_secs: Seconds from now; None for as long as it takes.
          error: What is raised when time is up.
        """
        self._task = task
        self._timeout_secs = timeout_secs
        self._error = error
        self._end = math.inf if timeout_secs is None else time.monotonic() + timeout_secs

    @property
    def left_secs(self) -> float:
        """Seconds that are left; 0 when time is up."""
        return max(0.0, self._end - time.monotonic())

    def wait_for_saves(self, session: Session) -> None:
        """Waits for the saves in flight that this process has now.

        It wakes when they have ended, and now and then to see whether the caller was interrupted.
        (Not by a callback of theirs: those of the user come first, and may take long.)

        Raises:
          IncompleteCheckpointError: They had not ended in time; or the error that was given.
        """
        saves = session.in_flight()
        while left := wait(saves, min(self.left_secs, _LONGEST_PAUSE_SECS)).not_done:
            self._require_time(f"saves of this process ({len(left)}) had not ended")
            self._task.check()

    @contextlib.contextmanager
    def locked(self, where: Place) -> Iterator[None]:
        """Locks all others out of a session, once no save into it is under way.

        The lock of another process is tried again and again, here as in `runs.liveness`: a `flock`
        that waits in the kernel has no timeout, and does not end when the caller is interrupted.

        Raises:
          IncompleteCheckpointError: Saves still were when time was up; or the error that was
            given.
          NoSessionError: There is no session, or none any more.
          CheckpointExistsError: What is at its place is not a session.
        """
        began, pause_secs, is_told = time.monotonic(), _FIRST_PAUSE_SECS, False

        def pause() -> None:
            nonlocal pause_secs, is_told
            self._require_time(f"another process, or save, still wrote into {where.session}")
            if not is_told and time.monotonic() - began > _PATIENCE_SECS:
                _LOG.warning("Waiting for another process, which saves into %s.", where.session)
                is_told = True
            self._task.sleep(min(self.left_secs, pause_secs))
            pause_secs = min(pause_secs * 1.5, _LONGEST_PAUSE_SECS)

        with where.locked_exclusively(pause):
            yield

    def _require_time(self, what: str) -> None:
        if not self.left_secs:
            raise self._error(
                f"After {self._timeout_secs:g} s {what}. The session is kept: call it again, or "
                "with a longer timeout_secs."
            )
