"""SIGTERM, with which a scheduler announces that it takes the machine: save, then stop.

The handler only records the signal. The step under way is finished; at its end it is saved and
finalized, and training is stopped. Then the handler that was there before, if any, is called.

Under `jax.distributed` JAX has a handler of its own, set by `jax.distributed.initialize`, and its
coordination service agrees on the step after which all processes save, whichever of them got the
signal (`jax.experimental.multihost_utils.reached_preemption_sync_point`). It is asked once a step.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import jax

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM


class Preemption:
    """After which step the callbacks of one hook save for the last time.

    All of them have to decide alike in one step, though the signal may come between two of them:
    the first to reach a point of the loop decides for all.

    Attributes:
      is_requested: Whether a signal came while it listened, and training was not stopped yet.
      has_stopped: Whether it has stopped training.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.has_stopped = False
        self._point: tuple[int, str] | None = None
        self._last_step: int | None = None
        self._users: set[str] = set()
        self._passed: set[str] = set()

    def watch(self, user: str) -> None:
        """Begins to listen, for a callback."""
        if not self._users:
            self.is_requested, self._point, self._last_step = False, None, None
            _handler.add(self)
        self._users.add(user)

    def unwatch(self, user: str) -> None:
        """Ends that; the last callback of all hooks brings back the handler of before."""
        self._users.discard(user)
        if not self._users:
            self.is_requested = self.has_stopped = False
            _handler.remove(self)

    def reach(self, step: int, hook: str) -> None:
        """Decides, for all callbacks, whether the finished `step` is the last one."""
        if self._point == (step, hook):
            return
        self._point = (step, hook)
        if self._must_end(step, hook):
            self._last_step = step
            self._passed = set()
            logger.warning("Asked to end: step %d is saved, then training is to stop.", step)

    def is_due(self, step: int) -> bool:
        """Whether to save `step`, be it under way or finished."""
        if step == self._last_step:
            return True
        is_under_way = self._point is None or step > self._point[0]
        return is_under_way and self.is_requested and not _is_distributed()

    def is_last(self, user: str, step: int) -> bool:
        """Whether `step` is the last one, and all callbacks have saved it once this one has."""
        if step != self._last_step:
            return False
        self._passed.add(user)
        return self._passed >= self._users

    def stop(self, trainer: Any) -> None:
        """Stops a training whose last step is finalized.

        Raises:
          SystemExit: There is no `trainer.should_stop` to be set, and no handler of before.
        """
        self._last_step = None
        self.is_requested, self.has_stopped = False, True
        can_stop = hasattr(trainer, "should_stop")
        if can_stop:
            trainer.should_stop = True
        if not all(listener.has_stopped for listener in _handler.listeners):
            return
        for listener in _handler.listeners:
            listener.has_stopped = False
        if callable(_handler.before):
            _handler.before(signal.SIGTERM, None)
        elif not can_stop:
            raise SystemExit(EXIT_STATUS)

    def _must_end(self, step: int, hook: str) -> bool:
        if not _is_distributed():
            return self.is_requested
        if hook != "on_train_batch_end":
            return False
        from jax.experimental import multihost_utils

        try:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        except RuntimeError as error:  # `jax_enable_preemption_service` is off
            logger.debug("No service reports when this process is to end: %s", error)
            return False


class _Handler:
    """This process's handler of SIGTERM, there while some hook listens.

    Attributes:
      listeners: Of all hooks; weakly, as a loop that failed may never have said so.
      before: The handler that was there before.
    """

    def __init__(self) -> None:
        self.listeners: WeakSet[Preemption] = WeakSet()
        self.before: Any = None
        self._is_set = False

    def add(self, listener: Preemption) -> None:
        if not (self.listeners or self._is_set or _is_distributed()):  # set: by one forgotten since
            self._set()
        self.listeners.add(listener)

    def remove(self, listener: Preemption) -> None:
        self.listeners.discard(listener)
        if not self.listeners and self._is_set:
            self._bring_back()

    def _set(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        if before in (None, signal.SIG_IGN):  # set by other than Python, or to be ignored
            return
        if threading.current_thread() is not threading.main_thread():
            logger.debug("Training runs in a thread that cannot listen to SIGTERM.")
            return
        signal.signal(signal.SIGTERM, self._record)
        self.before, self._is_set = before, True

    def _bring_back(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._is_set = False
        before, self.before = self.before, None
        if signal.getsignal(signal.SIGTERM) == self._record:  # else it was replaced
            signal.signal(signal.SIGTERM, before)

    def _record(self, number: int, frame: FrameType | None) -> None:
        listeners = tuple(self.listeners)
        for listener in listeners:
            listener.is_requested = True
        if not listeners:  # all were garbage before their training ended
            self._bring_back()
            signal.raise_signal(number)


_handler = _Handler()


def _is_distributed() -> bool:
    return jax.distributed.is_initialized()
