"""Threads that do the work of calls, and how a caller waits for them.

All that writes, locks or waits for other processes is done by workers. CPython delivers signals to
the main thread alone, so that an interrupt meets a caller who waits, or one of the few steps by
which a task is handed over: never a lock that is held, or half a file.

Invariants: a worker that has nothing to do ends after a while, and at once when the interpreter
does; an interpreter that exits normally finishes all work first, and reports it. Callers meet no
`threading.Condition`, in which an interrupt can leave the lock held: they wait for plain locks.
"""

import contextlib
import functools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from itertools import islice
from typing import Any, Generic, TypeVar

from flax_partial.sessions.handles import Handle

T = TypeVar("T")
_LOG = logging.getLogger("flax_partial")
_IDLE_SECS = 1.0
_MOST_LOOKED_AT = 64  # tasks that `WorkerPool.has_queued` looks through


class StoppedError(InterruptedError):
    """The caller who waited for this was interrupted; it was undone."""


class Task(Generic[T]):
    """Work that one worker does once, for a caller who may wait for it, or stop it."""

    def __init__(
        self,
        work: Callable[["Task[T]"], T],
        handle: Handle[T],
        *,
        subject: object = None,
        withdrawn: Callable[[], None] = lambda: None,
        skipped: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares a task.

        Args:
          work: What is to be done; given the task, whose `check` it calls between its steps.
          handle: Becomes the outcome.
          subject: What the work is about, by which `WorkerPool.tasks_about` finds it.
          withdrawn: Called by the thread that withdraws it: undoes what was done for it.
          skipped: Called by the worker that comes to the task and finds it withdrawn.
        """
        self.handle = handle
        self.subject = subject
        self._work: Callable[[Task[T]], T] | None = work
        self._withdrawn = withdrawn
        self._skipped = skipped
        self._turn = threading.Lock()  # the first to acquire it decides: begun, or withdrawn
        self._over = threading.Lock()  # held until the task has ended
        self._over.acquire()
        self._stop = threading.Event()
        self.is_submitted = False
        self.is_ready = True  # a worker leaves out what is not, until `WorkerPool.wake`
        self.is_over = False

    def run(self) -> None:
        """Does the work, unless it was withdrawn; raises nothing."""
        if not self._turn.acquire(blocking=False):
            self._skipped()
            return
        work, self._work = self._work, None  # it refers to what is saved
        try:
            assert work is not None  # noqa: S101 - only one thread has the turn
            outcome = work(self)
        except BaseException as error:  # noqa: BLE001 - raised to those who wait for the handle
            self._end(functools.partial(self.handle.set_exception, error))
        else:
            self._end(functools.partial(self.handle.set_result, outcome))

    def withdraw(self) -> bool:
        """Keeps the work from beginning; returns whether it had not."""
        if not self._turn.acquire(blocking=False):
            return False
        self._work = None
        self._withdrawn()
        self._end(lambda: self.handle.abandon(StoppedError(StoppedError.__doc__)))
        return True

    def stop(self) -> bool:
        """Withdraws the task, or asks its worker to stop; returns whether it was withdrawn."""
        self._stop.set()
        return self.withdraw()

    def check(self) -> None:
        """Raises StoppedError if the caller has asked the worker to stop."""
        if self._stop.is_set():
            raise StoppedError(StoppedError.__doc__)

    def sleep(self, secs: float) -> None:
        """Sleeps, unless the caller asks the worker to stop: raises StoppedError then."""
        self._stop.wait(secs)
        self.check()

    def wait(self) -> None:
        """Waits until the task has ended; for the one caller who has handed it over."""
        if not self.is_over:
            self._over.acquire()

    def _end(self, report: Callable[[], None]) -> None:
        try:
            with contextlib.suppress(InvalidStateError):
                report()
        finally:
            self.is_over = True
            self._over.release()


class WorkerPool:
    """At most `most` threads, which do tasks in the order in which they were submitted.

    What is not ready is left out; what makes it ready calls `wake`.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self.forget_threads()
        _pools.add(self)

    def forget_threads(self) -> None:
        """Begins anew, as in a forked child, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._queue: deque[Task[Any]] = deque()
        self._running: dict[int, Task[Any]] = {}  # by the thread
        self._threads: set[int] = set()
        self._draining: set[int] = set()
        self._idle: list[threading.Lock] = []  # each held by a worker that waits for its release

    def submit(self, *tasks: Task[Any]) -> None:
        """Has workers do tasks, after those submitted before them."""
        for task in tasks:
            task.is_submitted = True
        if _exit.is_near():  # no thread can be started any more, and none would be waited for
            for task in tasks:
                task.run()
            return
        with self._lock:
            self._queue.extend(tasks)
        for _ in range(min(self._most, sum(task.is_ready for task in tasks))):
            self._start_one()

    def wake(self) -> None:
        """Has a worker look for a task that has become ready."""
        if _exit.is_near():
            self._drain()
        else:
            self._start_one()

    def _start_one(self) -> None:
        with self._lock:
            if self._idle:
                self._idle.pop().release()
                return
            is_full = len(self._threads) >= self._most
        if not is_full:
            self._start_thread()

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=self._name).start()
        except RuntimeError:  # the system, or an interpreter that is ending, starts no more
            self._drain()

    def run(self, task: Task[T]) -> T:
        """Has a worker do a task, and returns its outcome.

        A first interrupt of the caller stops the task, and goes on once that has ended; a second
        one does not wait.
        """
        try:
            if threading.get_ident() in self._threads:  # it would wait for itself
                task.is_submitted = True
                task.run()
            else:
                with place_lent():
                    self.submit(task)
                    task.wait()
        except BaseException:
            task.stop()
            task.wait()
            raise
        return task.handle.result()

    def tasks_about(self, subject: object) -> list[Task[Any]]:
        """The tasks that are queued or being done about something."""
        with self._lock:
            tasks = [*self._running.values(), *self._queue]
        return [task for task in tasks if task.subject is subject and not task.is_over]

    def has_queued(self, subject: object) -> bool:
        """Whether one of the tasks to be done next is about something."""
        with self._lock:
            return any(
                task.subject is subject and not task.is_over
                for task in islice(self._queue, _MOST_LOOKED_AT)
            )

    @property
    def unfinished(self) -> int:
        """Number of tasks that are queued or being done."""
        with self._lock:
            tasks = [*self._running.values(), *self._queue]
            return sum(not task.handle.done() for task in tasks)  # as callers see it

    def release_idle(self) -> None:
        """Has the workers that wait for a task end, unless there is one."""
        with self._lock:
            idle, self._idle = self._idle, []
        for gate in idle:
            gate.release()

    def _work(self) -> None:
        thread = threading.get_ident()
        with self._lock:
            if len(self._threads) >= self._most:  # several callers have started one at once
                return
            self._threads.add(thread)
        while (task := self._next(thread)) is not None:
            try:
                task.run()
            except BaseException:  # noqa: BLE001 - such as SystemExit in a callback of a handle
                _LOG.exception("flax_partial: a callback of a handle failed")
            del task  # it may hold a snapshot

    def lend(self, thread: int) -> bool:
        """Has another worker come in the place of one that waits; returns whether it is one."""
        with self._lock:
            if thread not in self._threads:
                return False
            self._threads.discard(thread)
            is_needed = bool(self._queue)
        if is_needed:
            self._start_thread()
        return True

    def take_back(self, thread: int) -> None:
        """Counts a worker again that waits no more; for a while there may be more of them."""
        with self._lock:
            self._threads.add(thread)

    def _drain(self) -> None:
        """Does what is queued, and ready, in the caller's thread."""
        thread = threading.get_ident()
        if thread in self._draining:  # of a task that made another one ready: it comes next
            return
        self._draining.add(thread)
        try:
            while True:
                with self._lock:
                    task = self._pop()
                if task is None:
                    return
                task.run()
        finally:
            self._draining.discard(thread)

    def _pop(self) -> Task[Any] | None:
        """Takes the first task that is ready, or was withdrawn, out of the queue."""
        for at, task in enumerate(self._queue):
            if task.is_ready or task.is_over:
                del self._queue[at]
                return task
        return None

    def _next(self, thread: int) -> Task[Any] | None:
        """Waits for a task for a while; None where there is none, and the worker is to end."""
        gate = threading.Lock()
        for is_last in (False, True):
            with self._lock:
                self._running.pop(thread, None)
                if gate in self._idle:  # it was never released
                    self._idle.remove(gate)
                task = self._pop()
                if task is not None:
                    self._running[thread] = task
                    return task
                if is_last or _exit.is_near():
                    self._threads.discard(thread)
                    return None
                gate.acquire()
                self._idle.append(gate)
            gate.acquire(timeout=_IDLE_SECS)
        raise AssertionError


_pools: "weakref.WeakSet[WorkerPool]" = weakref.WeakSet()


def release_idle() -> None:
    """Has all workers that wait for a task end now, instead of after a while."""
    for pool in list(_pools):
        pool.release_idle()


@contextlib.contextmanager
def place_lent() -> Iterator[None]:
    """Lends this thread's place, should it be a worker's, to another worker while it waits.

    A callback of a handle is called by a worker, and may wait for what its pool has to do yet.
    """
    thread = threading.get_ident()
    lent = [pool for pool in list(_pools) if pool.lend(thread)]
    try:
        yield
    finally:
        for pool in lent:
            pool.take_back(thread)


class _Exit:
    """The end of the interpreter: what is in flight is finished first, which is reported."""

    def __init__(self) -> None:
        self._is_near = False
        # What concurrent.futures uses too: called before threads are joined, atexit comes after.
        threading._register_atexit(self._come)  # type: ignore[attr-defined] # noqa: SLF001

    def is_near(self) -> bool:
        """Whether the main thread has ended."""
        return self._is_near

    def _come(self) -> None:
        self._is_near = True
        saves, finalizes = saving.unfinished, finalizing.unfinished
        if saves or finalizes:
            _LOG.warning(
                "flax_partial: finishing %d saves and %d finalizes in flight before the process "
                "exits",
                saves,
                finalizes,
            )
        release_idle()


def _count_writers() -> int:
    """Two on two cores, and two less than there are on machines with more.

    One hashes while the other waits for the disk. More than there are cores take the interpreter
    lock from the training thread: with four on two it was held twice as long by a step's saves.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, max(2, (cores or 2) - 2))


MOST_WRITERS = _count_writers()

saving = WorkerPool("flax_partial-save", MOST_WRITERS)
helping = WorkerPool("flax_partial-help", MOST_WRITERS)
moving = WorkerPool("flax_partial-move", 2)  # one waits for its transfer, the next is issued
compiling = WorkerPool("flax_partial-compile", 1)
finalizing = WorkerPool("flax_partial-finalize", 64)  # a finalize may wait for other processes
_exit = _Exit()


def _task(work: Callable[[], T]) -> Task[T]:
    return Task(lambda _: work(), Handle[T]())


@contextlib.contextmanager
def beside(work: Callable[[], T]) -> Iterator[Handle[T]]:
    """Does a share of a worker's work on another thread; it has ended when the context has."""
    task = _task(work)
    helping.submit(task)
    try:
        yield task.handle
    finally:
        task.wait()


def spread(works: Sequence[Callable[[], T]]) -> list[T]:
    """Does work on several threads, this one among them; all has ended at the return.

    Raises:
      BaseException: What the first that failed has raised.
    """
    if len(works) == 1:
        return [works[0]()]
    tasks = [_task(work) for work in works]
    for task in tasks[1:]:
        helping.submit(task)
    for task in tasks:  # those that no other thread has begun
        task.run()
    for task in tasks:
        task.wait()
    return [task.handle.result() for task in tasks]


def threads_per_save() -> int:
    """How many threads each save under way may have, so that all writers have work."""
    return max(1, MOST_WRITERS // max(1, saving.unfinished))


def _forget_threads() -> None:
    for pool in list(_pools):
        pool.forget_threads()


os.register_at_fork(after_in_child=_forget_threads)
