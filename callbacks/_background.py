"""A thread for what training need not wait for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Worker:
    """Does one job after another, in a thread that is there only while there are some.

    A job that raises is logged and stops nothing: whose errors matter hands them on by itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: deque[tuple[Future[None], Callable[[], None]]] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Has a job done after those before it.

        Raises:
          RuntimeError: The interpreter is ending: nothing new can be begun.
        """
        future: Future[None] = Future()
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name=self._name)
                thread.start()  # it waits for the lock
                self._thread = thread
            self._jobs.append((future, work))
        return future

    def finish(self) -> None:
        """Waits until nothing is left to do, and the thread has ended."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                future, work = self._jobs.popleft()
            try:
                work()
            except Exception:
                logger.exception("Could not tidy up after a checkpoint.")
            finally:
                future.set_result(None)
