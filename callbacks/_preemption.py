"""SIGTERM, with which a scheduler announces that it takes the machine: save, then stop.

Other signals can be listened to as well, as SLURM's `--signal=USR1@300` sends one. The handler only
records the signal. The step under way is finished; at its end it is saved and finalized, and
training is stopped. Then the handler that was there before, if any, is called.

Under `jax.distributed` JAX has a handler of its own, set by `jax.distributed.initialize`, and its
coordination service agrees on the step after which all processes save, whichever of them got the
signal (`jax.experimental.multihost_utils.reached_preemption_sync_point`). It is called once a step.
It reacts to SIGTERM only: any other signal that is listened to is passed on as that.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import jax

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

logger = logging.getLogger(__name__)


class Preemption:
    """After which step the callbacks of one hook save for the last time.

    All of them have to decide alike in one step, though the signal may come between two of them:
    the first to reach a point of the loop decides for all.

    Attributes:
      requested_by: The signal that came while it listened, if training was not stopped since.
      has_stopped: Whether it has stopped training.
    """

    def __init__(self) -> None:
        self.requested_by: int | None = None
        self.has_stopped = False
        self._point: tuple[int, str] | None = None
        self._last_step: int | None = None
        self._users: set[str] = set()
        self._passed: set[str] = set()

    def watch(self, user: str, signals: Iterable[int]) -> None:
        """Begins to listen to signals, for a callback."""
        if not self._users:
            self.requested_by = self._point = self._last_step = None
        for number in signals:
            _handlers.setdefault(number, _Handler(number)).add(self)
        self._users.add(user)

    def unwatch(self, user: str) -> None:
        """Ends that; the last callback of all hooks brings back the handler of before."""
        self._users.discard(user)
        if not self._users:
            self.requested_by, self.has_stopped = None, False
            for handler in _handlers.values():
                handler.remove(self)

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
        return is_under_way and self.requested_by is not None and not _is_distributed()

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
        number = signal.SIGTERM if self.requested_by is None else self.requested_by
        handler = _handlers.setdefault(number, _Handler(number))
        self._last_step = self.requested_by = None
        self.has_stopped = True
        can_stop = hasattr(trainer, "should_stop")
        if can_stop:
            trainer.should_stop = True
        if not all(listener.has_stopped for listener in handler.listeners):
            return
        for listener in handler.listeners:
            listener.has_stopped = False
        if callable(handler.before):
            handler.before(number, None)
        elif not can_stop:
            raise SystemExit(128 + number)

    def _must_end(self, step: int, hook: str) -> bool:
        if not _is_distributed():
            return self.requested_by is not None
        if hook != "on_train_batch_end":
            return False
        from jax.experimental import multihost_utils

        try:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        except RuntimeError as error:  # `jax_enable_preemption_service` is off
            logger.debug("No service reports when this process is to end: %s", error)
            return False


class _Handler:
    """This process's handler of a signal, there while some hook listens.

    Attributes:
      listeners: Of all hooks; weakly, as a loop that failed may never have ended.
      before: The handler that was there before.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self.listeners: WeakSet[Preemption] = WeakSet()
        self.before: Any = None
        self._is_set = False

    def add(self, listener: Preemption) -> None:
        is_jaxs = self._number == signal.SIGTERM and _is_distributed()
        if not (self.listeners or self._is_set or is_jaxs):  # set: by one forgotten since
            self._set()
        self.listeners.add(listener)

    def remove(self, listener: Preemption) -> None:
        self.listeners.discard(listener)
        if not self.listeners and self._is_set:
            self._bring_back()

    def _set(self) -> None:
        before = signal.getsignal(self._number)
        if before in (None, signal.SIG_IGN):  # set by other than Python, or to be ignored
            return
        if threading.current_thread() is not threading.main_thread():
            logger.debug(
                "Training does not run in the main thread, so that it cannot listen to signals."
            )
            return
        signal.signal(self._number, self._record)
        self.before, self._is_set = before, True

    def _bring_back(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._is_set = False
        before, self.before = self.before, None
        if signal.getsignal(self._number) == self._record:  # else it was replaced
            signal.signal(self._number, before)

    def _record(self, number: int, frame: FrameType | None) -> None:
        listeners = tuple(self.listeners)
        for listener in listeners:
            listener.requested_by = number
        if listeners and _is_distributed():
            signal.raise_signal(signal.SIGTERM)  # which JAX's own handler receives
        if not listeners:  # all were garbage before their training ended
            self._bring_back()
            signal.raise_signal(number)


_handlers: dict[int, _Handler] = {}  # by signal


def _is_distributed() -> bool:
    return jax.distributed.is_initialized()


def check_signals(signals: Iterable[int]) -> frozenset[signal.Signals]:
    """Returns the signals to listen to.

    Raises:
      ValueError: One is none of this system's, or cannot be listened to.
    """
    deaf = {signal.SIGKILL, signal.SIGSTOP}
    found = frozenset(map(signal.Signals, signals))
    if found & deaf:
        raise ValueError(f"No process can listen to {', '.join(one.name for one in found & deaf)}.")
    return found
