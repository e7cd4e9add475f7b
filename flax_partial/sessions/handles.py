"""Threads that write in the background, and the handles to what they do.

Invariants: a thread lives only while there is work, so that handles nobody waits for leave nothing
behind; an interpreter that exits normally finishes all work first, and says so.
"""

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

from flax_partial.reports import CheckpointMetadata, SaveReport

T = TypeVar("T")
_LOG = logging.getLogger("flax_partial")
# One hashes while the other waits for the disk. More of them take the interpreter lock from the
# training thread: with four it was held twice as long by the saves of one step.
_MOST_WRITERS = 2


class _Handle(Future[T]):
    """A future that cannot be cancelled, and knows whether its error was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._was_seen = False

    def result(self, timeout: float | None = None) -> T:
        """Waits at most `timeout` seconds for the outcome; returns it, or raises its error."""
        self.exception(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits at most `timeout` seconds for the outcome; returns its error, or None."""
        error = super().exception(timeout)
        self._was_seen = True
        return error

    @property
    def has_failed(self) -> bool:
        """Whether it is done, with an error; does not count as asking for it."""
        return self.done() and super().exception() is not None

    def unseen_error(self) -> BaseException | None:
        """Returns the error of a finished handle that nobody asked for, once."""
        if not self.done() or self._was_seen:
            return None
        return self.exception()

    def abandon(self, error: BaseException) -> None:
        """Ends a handle whose work was never begun; whoever calls this raises the error."""
        self._was_seen = True
        with contextlib.suppress(InvalidStateError):
            self.set_exception(error)

    def run(self, work: Callable[[], T]) -> None:
        """Does the work, and becomes its outcome."""
        with contextlib.suppress(InvalidStateError):  # it was abandoned meanwhile
            try:
                outcome = work()
            except BaseException as error:  # noqa: BLE001 - whoever waits for the handle raises it
                self.set_exception(error)
            else:
                self.set_result(outcome)


class SaveHandle(_Handle[SaveReport]):
    """A save in flight; has the interface of `concurrent.futures.Future`."""


class FinalizeHandle(_Handle[CheckpointMetadata]):
    """A finalize in flight; has the interface of `concurrent.futures.Future`."""


class Workers:
    """A pool of at most `most` threads, which end when there is nothing to do."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Callable[[], None]] = deque()
        self._threads: dict[threading.Thread, int] = {}  # by which thread each is started
        self._busy = 0

    def submit(self, work: Callable[[], None]) -> None:
        """Runs `work`, which raises nothing, on a thread, after what was submitted before it."""
        _finish_before_exit()
        with self._lock:
            self._queue.append(work)
            for other, starter in list(self._threads.items()):
                if other.ident is None and starter == threading.get_ident():
                    del self._threads[other]  # an interrupt kept this thread from starting it
            if len(self._threads) >= self._most:
                return
            thread = threading.Thread(target=self._drain, name=self._name)
            self._threads[thread] = threading.get_ident()
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self._threads.pop(thread, None)
            self._drain()

    def withdraw(self, work: Callable[[], None]) -> None:
        """Takes work that is not begun out of the queue."""
        with self._lock, contextlib.suppress(ValueError):
            self._queue.remove(work)

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads.pop(threading.current_thread(), None)
                    return
                work = self._queue.popleft()
                self._busy += 1
            try:
                work()
            finally:
                del work  # it holds the snapshot
                with self._lock:
                    self._busy -= 1

    @property
    def unfinished(self) -> int:
        """Number of pieces of work that are not done."""
        return len(self._queue) + self._busy


saving = Workers("flax_partial-save", _MOST_WRITERS)
_helping = Workers("flax_partial-help", _MOST_WRITERS)
finalizing = Workers("flax_partial-finalize", 64)  # a finalize may wait for other processes


def in_background(work: Callable[[], T]) -> "Future[T]":
    """Does a share of other work on a thread of its own; the caller waits for the outcome."""
    handle: _Handle[T] = _Handle()
    _helping.submit(lambda: handle.run(work))
    return handle


_exit_lock = threading.Lock()
_is_registered = False


def _renew_exit_lock() -> None:
    """In a forked child nobody would give back what a thread of the parent held."""
    global _exit_lock  # noqa: PLW0603 - once a process
    _exit_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_exit_lock)


def _finish_before_exit() -> None:
    """Has the interpreter's exit say what it waits for; the wait itself is Python's own."""
    global _is_registered  # noqa: PLW0603 - once a process
    with _exit_lock:
        if not _is_registered:
            _is_registered = True
            # What concurrent.futures uses too: before threads are joined; atexit comes after that.
            threading._register_atexit(_say_what_is_left)  # type: ignore[attr-defined] # noqa: SLF001


def _say_what_is_left() -> None:
    saves, finalizes = saving.unfinished, finalizing.unfinished
    if saves or finalizes:
        _LOG.warning(
            "flax_partial: finishing %d saves and %d finalizes in flight before the process exits",
            saves,
            finalizes,
        )
