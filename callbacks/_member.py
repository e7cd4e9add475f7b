"""What a run needs of a callback that saves into it."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import flax_partial as fp

if TYPE_CHECKING:
    import signal

    from flax_partial.callbacks._clock import Clock
    from flax_partial.callbacks._schedule import Retention, Schedule

logger = logging.getLogger(__name__)


class Failures:
    """Errors of one callback's checkpoints, from any thread, until the callback raises them.

    Attributes:
      count: Number of checkpoints that failed.
      are_raised: Whether the callback raises them; else they are logged.
      logged: The last one that was only logged, with its step.
    """

    def __init__(self, on_save_error: Literal["raise", "warn"]) -> None:
        if on_save_error not in ("raise", "warn"):
            raise ValueError(f"on_save_error is {on_save_error!r}; it must be 'raise' or 'warn'.")
        self.count = 0
        self.are_raised = on_save_error == "raise"
        self.logged: tuple[int, BaseException] | None = None
        self._waiting: deque[tuple[int, BaseException]] = deque()

    def add(self, step: int, error: BaseException) -> None:
        """Counts the failed checkpoint of a step, and keeps or logs its error.

        That a device had no memory for copies does not end training: from now on none are made.
        """
        self.count += 1
        if self.are_raised and not isinstance(error, fp.DeviceMemoryError):
            self._waiting.append((step, error))
        else:
            logger.error("A checkpoint failed; training goes on.", exc_info=error)
            self.logged = (step, error.with_traceback(None))  # whose frames hold arrays

    def take_first(self) -> tuple[int, BaseException] | None:
        """Returns the oldest error that was not raised before, with its step; None without one."""
        return self._waiting.popleft() if self._waiting else None

    def log_all(self) -> None:
        """Logs the errors that can no longer be raised, because another one is under way."""
        while self._waiting:
            _, error = self._waiting.popleft()
            logger.error("Another checkpoint has failed, too.", exc_info=error)


@dataclass(eq=False, kw_only=True)
class Member:
    """A callback, as data.

    Attributes:
      key: Identifies it among the callbacks of its hook, in every run.
      schedule: At which steps it saves.
      clock: Decides when it is time to save; None if it does not save by time.
      retention: Which checkpoints it keeps.
      options: How its parts are written.
      reuse_unchanged: Whether its parts may share files with the checkpoint before.
      saves_initial: Whether it saves the state that training begins with, as step 0.
      shows_progress: Whether it shows a bar while training waits.
      signals: Those on which it saves and has training stop; none if on no signal.
      skips_when_behind: Whether it leaves out a step that is due while the checkpoint before is
        still on its way.
      failures: Where the run puts its errors.
      last_saved: The last step that it saved or restored; None before one.
      last_skipped: The last step that it left out, if that came after the last it saved; else None.
      skipped: Number of steps that it left out.
      has_checked: Whether the first step of training was found fit to be saved.
      has_finished_step: Whether it could save the last finished step, should training fail.
    """

    key: str
    schedule: Schedule
    clock: Clock | None
    retention: Retention
    options: fp.SaveOptions
    reuse_unchanged: bool
    saves_initial: bool
    shows_progress: bool
    signals: frozenset[signal.Signals]
    skips_when_behind: bool
    failures: Failures = field(repr=False)
    last_saved: int | None = None
    last_skipped: int | None = None
    skipped: int = 0
    has_checked: bool = False
    has_finished_step: bool = False
    _saved_before: int | None = field(default=None, init=False)
    _has_warned: bool = field(default=False, init=False)

    @property
    def saves_on_preemption(self) -> bool:
        """Whether it saves when a signal ends the process."""
        return bool(self.signals)

    def skip(self, step: int) -> None:
        """Counts a step that is left out, once, and logs it."""
        if step != self.last_skipped:
            self.last_skipped = step
            self.skipped += 1
            logger.info(
                "Step %d is not saved: the checkpoint before is still being written (%d so far).",
                step,
                self.skipped,
            )

    def saved(self, step: int) -> None:
        """Notes that a step was saved."""
        self._saved_before = self.last_saved
        self.last_saved, self.last_skipped = step, None

    def take_back(self) -> None:
        """Notes that the step that was saved last has failed, and may be saved again."""
        self.last_saved = self._saved_before

    def warn_once(self, message: str) -> None:
        """Logs that its monitor scores nothing, the first time only: every step may lack it."""
        if not self._has_warned:
            logger.warning("%s", message)
        self._has_warned = True
