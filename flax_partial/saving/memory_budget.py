"""Bounds the host memory that snapshots waiting to be written hold."""

import ctypes
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache

from flax_partial.sessions import workers


@dataclass(eq=False, slots=True)
class _Waiting:
    """A caller that waits for room, until the lock is released."""

    owner: Hashable
    size: int
    limit: int
    granted: threading.Lock = field(default_factory=threading.Lock)


class MemoryBudget:
    """Bytes that snapshots waiting to be written hold, in this process, by their saves.

    Under a limit, what they held is given back to the system, too: glibc keeps freed arrays of up
    to 32 MiB, and does so for each few threads. Streaming 2 GiB of layers with 64 MiB in flight
    held 350 MiB that way, and holds 160. Without a limit memory is kept, which is faster.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below, for an instant at a time
        self._sizes: dict[Hashable, int] = {}
        self._total = 0
        self._waiting: list[_Waiting] = []
        self._freed = 0  # since memory was last given back to the system

    def acquire(self, owner: Hashable, size: int, *, limit: int | None) -> float:
        """Waits until `size` more bytes fit under `limit`; returns the seconds that it took.

        What is larger than the limit by itself waits until it is alone. Callers wait for plain
        locks: in a condition an interrupt could leave the lock held.
        """
        started = time.perf_counter()
        with self._lock:
            if limit is None or not self._sizes or self._total + size <= limit:
                self._grant(owner, size)
                return time.perf_counter() - started
            waiting = _Waiting(owner, size, limit)
            waiting.granted.acquire()
            self._waiting.append(waiting)
        try:
            with workers.place_lent():
                waiting.granted.acquire()
        finally:
            with self._lock:
                if waiting in self._waiting:  # it was interrupted
                    self._waiting.remove(waiting)
        return time.perf_counter() - started

    def release(self, owner: Hashable, *, limit: int | None) -> None:
        """Gives back what an owner holds, if anything; nothing has its snapshot any more."""
        with self._lock:
            size = self._sizes.pop(owner, 0)
            self._total -= size
            for waiting in self._waiting[:]:
                if not self._sizes or self._total + waiting.size <= waiting.limit:
                    self._waiting.remove(waiting)
                    self._grant(waiting.owner, waiting.size)
                    waiting.granted.release()
            self._freed += size if limit is not None else 0
            is_much = limit is not None and 2 * self._freed >= limit
            if is_much:
                self._freed = 0
        if is_much and (trim := _malloc_trim()) is not None:
            trim(0)

    def _grant(self, owner: Hashable, size: int) -> None:
        self._sizes[owner] = size
        self._total += size


@lru_cache(maxsize=1)
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    """glibc's own; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
