"""SIGTERM, with which a scheduler announces that it takes the machine: save, then stop.

The handler only takes note. The step under way is finished; at its end it is saved and finalized,
and training is told to stop. Then the handler that was there before, if any, is called.

Under `jax.distributed` JAX has a handler of its own, set by `jax.distributed.initialize`, and its
coordination service agrees on the step after which all processes save, whichever of them was told
(`jax.experimental.multihost_utils.reached_preemption_sync_point`). There it is asked once a step.
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
    """What a hook knows of it: after which step its callbacks save, for the last time.

    All callbacks of a hook have to decide alike in one step, though the signal may come between two
    of them: the first to reach a point of the loop decides for all.
    """

    def __init__(self) -> None:
        self._answered = 0  # how many signals have been dealt with
        self._point: tuple[int, str] | None = None
        self._last_step: int | None = None
        self._users: set[str] = set()
        self._passed: set[str] = set()
        self.has_answered = False

    def watch(self, user: str) -> None:
        """Begins to listen, for a callback."""
        if not self._users:
            self._answered = _signals.count
            _signals.watch(self)
        self._users.add(user)

    def unwatch(self, user: str) -> None:
        """Ends that; the last callback to do so brings back the handler of before."""
        self._users.discard(user)
        if not self._users:
            _signals.unwatch(self)

    def reach(self, step: int, hook: str) -> None:
        """Decides, for all callbacks, whether the finished `step` is the last one."""
        if self._point == (step, hook):
            return
        self._point = (step, hook)
        if self._is_asked(step, hook):
            self._last_step = step
            self._passed = set()
            logger.warning("Asked to end: step %d is saved, then training is to stop.", step)

    def is_due(self, step: int) -> bool:
        """Whether to save `step`, be it under way or finished."""
        if step == self._last_step:
            return True
        is_under_way = self._point is None or step > self._point[0]
        return is_under_way and not _is_distributed() and _signals.count > self._answered

    def is_last(self, user: str, step: int) -> bool:
        """Whether `step` is the last one, and all callbacks have saved it once this one has."""
        if step != self._last_step:
            return False
        self._passed.add(user)
        return self._passed >= self._users

    def stop(self, trainer: Any) -> None:
        """Tells a training whose last step is finalized to stop.

        Raises:
          SystemExit: There is no `trainer.should_stop` to be set, and no handler of before.
        """
        self._last_step = None
        self._answered = _signals.count
        self.has_answered = True
        can_stop = hasattr(trainer, "should_stop")
        if can_stop:
            trainer.should_stop = True
        if all(other.has_answered for other in _signals.watchers):
            before = _signals.all_answered()
            if callable(before):
                before(signal.SIGTERM, None)
            elif not can_stop:
                raise SystemExit(EXIT_STATUS)

    def _is_asked(self, step: int, hook: str) -> bool:
        if not _is_distributed():
            return _signals.count > self._answered
        if hook != "on_train_batch_end":
            return False
        from jax.experimental import multihost_utils

        try:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        except RuntimeError as error:  # `jax_enable_preemption_service` is off
            logger.debug("Nobody says when this process is to end: %s", error)
            return False


class _Signals:
    """The handler of this process, which all hooks share."""

    def __init__(self) -> None:
        self.count = 0
        self.watchers: WeakSet[Preemption] = WeakSet()
        self._before: Any = None
        self._is_set = False

    def watch(self, watcher: Preemption) -> None:
        if not self.watchers and not _is_distributed():
            self._set()
        self.watchers.add(watcher)

    def unwatch(self, watcher: Preemption) -> None:
        self.watchers.discard(watcher)
        watcher.has_answered = False
        if not self.watchers and self._is_set:
            self._bring_back()

    def all_answered(self) -> Any:
        """Begins anew; returns the handler of before."""
        for watcher in self.watchers:
            watcher.has_answered = False
        return self._before

    def _set(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        if before in (None, signal.SIG_IGN):  # set by other than Python, or not to be heard
            return
        if threading.current_thread() is not threading.main_thread():
            logger.debug("Training runs in a thread that cannot listen to SIGTERM.")
            return
        signal.signal(signal.SIGTERM, self._note)
        self._before, self._is_set = before, True

    def _bring_back(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._is_set = False
        before, self._before = self._before, None
        if signal.getsignal(signal.SIGTERM) == self._note:  # else somebody has put one over it
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if not self.watchers:  # whoever set it was forgotten, and never came to an end
            self._bring_back()
            signal.raise_signal(number)


_signals = _Signals()


def _is_distributed() -> bool:
    return jax.distributed.is_initialized()
