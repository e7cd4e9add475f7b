"""Saving at intervals of time, at the same step in all processes.

Their clocks differ, and so do the steps that they are at. So the first process's clock decides, and
when it is time every process posts, in the background, the last step that it was checked for, and
answers for no later one until all agree. They save the step after the furthest of these: no process
is past it. That takes two messages each way through JAX's coordination service, and no device; no
process waits for another one's training, only for its answer.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import jax

import flax_partial as fp

if TYPE_CHECKING:
    from datetime import timedelta

logger = logging.getLogger(__name__)

_WAIT_SECS = 7 * 24 * 3600.0  # for it to be time; then all wait again
_ANSWER_SECS = 10.0  # for the others to post their steps
_END_SECS = 5.0


class Clock:
    """Decides for each step whether it is time to save; alike in all processes."""

    def __init__(self, interval: timedelta) -> None:
        self._interval_secs = interval.total_seconds()
        self._changed = threading.Condition()  # guards all below; signals that any has changed
        self._since = time.monotonic()
        self._asked = 0  # the last step that it was checked for
        self._due: int | None = None  # the last step to be saved
        # Steps that all have agreed on: this process may be so far behind that there are several.
        self._agreed: list[int] = []
        self._is_agreeing = False  # answers for no later step meanwhile
        self._is_over = False
        self._thread: threading.Thread | None = None

    def start(self, name: str, step: int) -> None:
        """Begins to count.

        Args:
          name: The same in all processes; a new one for each run.
          step: The step that training goes on from.
        """
        self.stop()
        with self._changed:
            self._since, self._asked = time.monotonic(), step
            self._due, self._agreed = None, []
            self._is_over = False
        if jax.process_count() > 1:
            self._thread = threading.Thread(
                target=self._listen, args=(name,), name="flax_partial_clock", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Ends it; if this is the first process, in all others, too."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_END_SECS)  # the first process may come to its end much later

    def saved(self) -> None:
        """Starts the interval again: a checkpoint is being saved."""
        with self._changed:
            self._since = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save a step; the answer is the same each time."""
        with self._changed:
            while self._is_agreeing and step > self._asked:
                self._changed.wait()
            if step != self._asked:
                self._asked = step
                if self._is_time(step):
                    self._due = step
            return step == self._due

    def _is_time(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._left_secs() <= 0
        ahead = [agreed for agreed in self._agreed if agreed > step]
        is_time = len(ahead) < len(self._agreed)
        self._agreed = ahead
        return is_time

    def _left_secs(self) -> float:
        return self._since + self._interval_secs - time.monotonic()

    # In the background, if there are several processes.

    def _listen(self, name: str) -> None:
        while not self._is_over:
            try:
                goes_on = fp.agree(
                    f"time {name}",
                    ready=self._wait_until_time,
                    act=lambda said: said[0],
                    timeout_secs=_WAIT_SECS,
                )
                if not goes_on:
                    return
                self._agree_on_step(name)
            except Exception as error:  # noqa: BLE001 - of the service, or another process
                logger.debug("The processes could not agree on when to save: %s", error)
                time.sleep(min(1.0, self._interval_secs))

    def _wait_until_time(self) -> bool:
        if jax.process_index() > 0:
            return True
        with self._changed:
            while not self._is_over and (left := self._left_secs()) > 0:
                self._changed.wait(left)
            return not self._is_over

    def _agree_on_step(self, name: str) -> None:
        agreed: list[int] = []
        try:
            step = fp.agree(
                f"step {name}",
                ready=self._last_asked,
                act=lambda said: max(said.values()) + 1,
                timeout_secs=_ANSWER_SECS,
            )
            agreed = [step]
        finally:
            with self._changed:
                self._is_agreeing = False
                self._agreed += agreed
                self._since = time.monotonic()
                self._changed.notify_all()

    def _last_asked(self) -> int:
        with self._changed:
            self._is_agreeing = True
            return self._asked
