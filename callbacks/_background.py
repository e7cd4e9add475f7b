"""Jobs that training does not wait for."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Worker:
    """Does one job after another, in a thread that exists only while there are some.

    It is no `ThreadPoolExecutor`, which keeps an idle thread until it is shut down (a loop that
    fails may never come to that), and refuses all jobs once the main thread has ended.

    A job that raises is logged, and the next one is done: a job reports its errors by itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # guards all below
        self._jobs: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._thread: threading.Thread | None = None  # the last one that was started
        self._is_working = False

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Does a job after those before it.

        Where the interpreter is ending, and starts no thread any more, the caller's thread does it.
        """
        future: Future[None] = Future()
        with self._lock:
            if not self._is_working:
                thread = threading.Thread(target=self._work, name=self._name)
                with contextlib.suppress(RuntimeError):
                    thread.start()  # it waits for the lock
                    self._thread, self._is_working = thread, True
            if self._is_working:
                self._jobs.append((future, work))
                return future
        _do(work, future)
        return future

    def finish(self) -> None:
        """Waits until nothing is left to do, and the thread has ended."""
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._is_working = False
                    return
                future, work = self._jobs.popleft()
            _do(work, future)


def _do(work: Callable[[], None], future: Future[None]) -> None:
    try:
        work()
    except Exception:
        logger.exception("Could not tidy up after a checkpoint.")
    finally:
        future.set_result(None)
