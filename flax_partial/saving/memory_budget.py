"""Bounds the host memory that snapshots waiting to be written hold."""

import ctypes
import sys
import threading
import time
from functools import lru_cache


class MemoryBudget:
    """Bytes that snapshots waiting to be written hold, in this process, by who holds them.

    Under a limit, what they held is given back to the system, too: glibc keeps freed arrays of up
    to 32 MiB, and does so for each few threads. Streaming 2 GiB of layers with 64 MiB in flight
    held 350 MiB that way, and holds 160. Without a limit memory is kept, which is faster.
    """

    def __init__(self) -> None:
        self._held: dict[object, int] = {}
        self._freed = 0  # since memory was last given back
        self._changed = threading.Condition()

    def acquire(self, owner: object, size: int, *, limit: int | None) -> float:
        """Waits until `size` more bytes fit under `limit`; returns the seconds that it took.

        What is larger than the limit by itself waits until it is alone.
        """
        started = time.perf_counter()
        most = sys.maxsize if limit is None else limit
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._total() + size <= most)
            self._held[owner] = size
        return time.perf_counter() - started

    def _total(self) -> int:
        return sum(self._held.values())

    def release(self, owner: object, *, limit: int | None) -> None:
        """Gives back what an owner holds, if anything; nothing has its snapshot any more."""
        if limit is not None and owner in self._held:
            self._give_back_to_system(self._held[owner], limit)
        with self._changed:
            if self._held.pop(owner, None) is not None:
                self._changed.notify_all()

    def _give_back_to_system(self, size: int, limit: int) -> None:
        with self._changed:
            self._freed += size
            if 2 * self._freed < limit:
                return
            self._freed = 0
        trim = _malloc_trim()
        if trim is not None:
            trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    """glibc's own; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
