"""Bounds the host memory that snapshots on their way to the disk hold."""

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

from flax_partial.sessions import workers


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request for room."""

    owner: Hashable
    size: int
    limit: int
    granted: Callable[[], None]


class MemoryBudget:
    """Bytes that snapshots waiting to be written hold, in this process, by their saves.

    Requests are granted in the order in which they are made: what a save waits for is held by saves
    before it, which wait for none after them. Only saves of several threads may all hold some and
    wait for more: the first one gets it then, beyond the limit, as nothing will be given back.

    Under a limit, what they held is given back to the system, too: glibc keeps freed arrays of up
    to 32 MiB, and does so for each few threads. Streaming 2 GiB of layers with 64 MiB in flight
    held 350 MiB that way, and holds 160. Without a limit memory is kept, which is faster.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below, for an instant at a time
        self._sizes: dict[Hashable, int] = {}
        self._total = 0
        self._waiting: deque[_Waiting] = deque()
        self._freed = 0  # since memory was last given back to the system

    def acquire(self, owner: Hashable, size: int, *, limit: int | None) -> float:
        """Waits until `size` more bytes fit under `limit`; returns the seconds that it took.

        What is larger than the limit by itself waits until it is alone. Callers wait for plain
        locks: in a condition an interrupt could leave the lock held.
        """
        started = time.perf_counter()
        granted = threading.Lock()
        granted.acquire()
        try:
            self.request(owner, size, limit=limit, granted=granted.release)
            if not granted.acquire(blocking=False):
                with workers.place_lent():
                    granted.acquire()
        except BaseException:
            self._withdraw(owner)
            raise
        return time.perf_counter() - started

    def request(
        self, owner: Hashable, size: int, *, limit: int | None, granted: Callable[[], None]
    ) -> None:
        """Requests `size` more bytes under `limit`, and does not wait for them.

        Args:
          owner: Holds them until it releases them.
          size: How many.
          limit: What all may hold; None for no bound.
          granted: Called once they are granted, by this thread or the one that makes room.
        """
        with self._lock:
            if limit is not None and size:
                self._waiting.append(_Waiting(owner, size, limit, granted))
                due = self._grant_waiting()
            else:
                self._grant(owner, size)
                due = [granted]
        for tell in due:
            tell()

    def release(self, owner: Hashable, *, limit: int | None) -> None:
        """Gives back what an owner holds or waits for, if anything."""
        with self._lock:
            size = self._sizes.pop(owner, 0)
            self._total -= size
            self._drop(owner)
            due = self._grant_waiting()
            self._freed += size if limit is not None else 0
            is_much = limit is not None and 2 * self._freed >= limit
            if is_much:
                self._freed = 0
        for tell in due:
            tell()
        if is_much and (trim := _malloc_trim()) is not None:
            trim(0)

    def _withdraw(self, owner: Hashable) -> None:
        """Takes back what an owner waits for; others may fit now."""
        with self._lock:
            self._drop(owner)
            due = self._grant_waiting()
        for tell in due:
            tell()

    def _drop(self, owner: Hashable) -> None:
        self._waiting = deque(one for one in self._waiting if one.owner != owner)

    def _grant_waiting(self) -> list[Callable[[], None]]:
        """Grants what fits by now, and returns what to call, without the lock."""
        due = []
        while self._waiting and self._has_room(self._waiting[0]):
            one = self._waiting.popleft()
            self._grant(one.owner, one.size)
            due.append(one.granted)
        return due

    def _has_room(self, one: _Waiting) -> bool:
        if self._total + one.size <= one.limit:
            return True
        # Who waits gives nothing back; where all do, the first goes on, as one that is alone does.
        held_by_waiting = sum(self._sizes.get(other.owner, 0) for other in self._waiting)
        return self._total == held_by_waiting

    def _grant(self, owner: Hashable, size: int) -> None:
        self._sizes[owner] = self._sizes.get(owner, 0) + size
        self._total += size


@lru_cache(maxsize=1)
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    """glibc's own; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
