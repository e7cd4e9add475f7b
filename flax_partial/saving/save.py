"""Saving: how a state becomes a committed part, and what this process knows of each session.

A save claims its leaves, takes a snapshot, writes a part beside all others, and commits it. It
looks at nothing that other processes wrote: its cost is that of its own leaves. While it is under
way it holds a shared lock on the session, so that finalize and abort wait for it.
"""

import atexit
import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.profiler import TraceAnnotation

from flax_partial import collector
from flax_partial.distributed import agreement as processes
from flax_partial.errors import CorruptCheckpointError, EmptyStateError, NoSessionError
from flax_partial.format import keypaths
from flax_partial.format.metadata import check_metadata
from flax_partial.format.model import Leaf, Part, data_file_bytes, data_part, data_path
from flax_partial.format.tables import encode_part
from flax_partial.options import SaveOptions
from flax_partial.reports import SaveReport, SaveTimes
from flax_partial.saving import snapshot
from flax_partial.saving.claims import Ledger
from flax_partial.saving.memory_budget import MemoryBudget
from flax_partial.saving.reuse import DataFile, Earlier
from flax_partial.saving.saved_arrays import SavedArrays
from flax_partial.saving.snapshot import Described
from flax_partial.saving.write import link_files, write_part
from flax_partial.sessions import handles as workers
from flax_partial.storage import local as storage
from flax_partial.storage.local import CheckpointPath, PathLike
from flax_partial.storage.parts import prefix_of_name, read_parts

if TYPE_CHECKING:
    from types import FrameType

_DEFAULTS = SaveOptions()
_POLL_SECS = 1e-3
_LOG = logging.getLogger("flax_partial")
_budget = MemoryBudget()
_saved_arrays = SavedArrays()


def save(
    path: PathLike,
    state: Any,
    *,
    custom_metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    options: SaveOptions | None = None,
    reuse: PathLike | None = None,
) -> SaveReport:
    """Adds a state to the unfinished checkpoint of `path`, and returns when it is durable.

    Args:
      path: Where the finalized checkpoint will be; until then parts wait in `<path>.partial_save`.
      state: Any JAX pytree; an empty one (`{}`) saves `custom_metadata` alone. Leaves: `jax.Array`,
        `np.ndarray`, NumPy scalars, typed PRNG keys, bool, int, float, complex, str, None, empty
        containers, `Slice`.
      custom_metadata: JSON values under string keys. Those of several saves merge deeply; the later
        value wins.
      replace: Whether leaves that the session holds already are replaced; an error otherwise.
        Replacing some rows of a leaf that is saved in `Slice`s means saving all of them again.
      options: How to write it.
      reuse: A finalized checkpoint. Leaves that this process saved into it, and that hold the same
        to the byte, are not written again: both checkpoints share the files that hold them, and
        either may be removed. Where it is not there (any more), or its files cannot be linked to,
        everything is written.

    Returns:
      What was committed, and how long it took.

    Raises:
      CheckpointExistsError: A finalized checkpoint, or something else, is at `path`.
      KeyConflictError: A leaf is in the session already, or cannot stand beside others in one tree.
      UnsupportedLeafError: No checkpoint can hold some leaf, key, or value of `custom_metadata`.
      EmptyStateError: `state` has no leaves, and there is no `custom_metadata`.
      OSError: Writing failed. Like after every other error, the session is as it was before.
    """
    saving = _prepare(path, state, custom_metadata, replace, options or _DEFAULTS, reuse=reuse)
    return saving.run()


def save_async(
    path: PathLike,
    state: Any,
    *,
    custom_metadata: Mapping[str, Any] | None = None,
    replace: bool = False,
    options: SaveOptions | None = None,
    reuse: PathLike | None = None,
) -> workers.SaveHandle:
    """Like `save`, but returns as soon as the caller may donate, delete or overwrite its arrays.

    It waits for no computation. Any number may be in flight, from any threads. An error of writing
    is raised by the handle; if nobody asks it, by the next call on the same path.

    Args:
      path: As for `save`.
      state: As for `save`.
      custom_metadata: As for `save`.
      replace: As for `save`.
      options: As for `save`; `max_inflight_bytes` bounds what waits to be written.
      reuse: As for `save`.

    Returns:
      A handle with the interface of `concurrent.futures.Future`; its result is a `SaveReport`.

    Raises:
      CheckpointExistsError: As for `save`; so are the other errors about what is passed.
    """
    with collector.paused():
        saving = _prepare(path, state, custom_metadata, replace, options or _DEFAULTS, reuse=reuse)
    handle = workers.SaveHandle()

    def work() -> None:
        handle.run(saving.run)

    try:
        saving.detach()
        saving.session.track(handle)
        saving.hand_over()
        workers.saving.submit(work)
    except BaseException as error:  # a KeyboardInterrupt, too: nobody must wait for this handle
        if saving.take_back():
            handle.abandon(error)
            workers.saving.withdraw(work)
            saving.give_up()
        raise
    return handle


def _prepare(
    path: PathLike,
    state: Any,
    custom_metadata: Mapping[str, Any] | None,
    replace: bool,  # noqa: FBT001 - the public functions name it
    options: SaveOptions,
    *,
    reuse: PathLike | None,
) -> "_Saving":
    """Checks everything that a caller can get wrong, then enters the session and claims leaves."""
    started = time.perf_counter()
    where = storage.resolve(path)
    earlier = None if reuse is None else storage.resolve(reuse)
    if not isinstance(options, SaveOptions):
        raise TypeError(f"options is a SaveOptions, not {type(options).__name__}")
    metadata = check_metadata(custom_metadata)
    flat = _flatten(state, metadata)
    described = _describe(flat, options)
    arrays = [] if earlier is None else [snapshot.lasting(value) for _, value in flat]
    with _sessions_lock:
        session = _known_session(where)
        saving = _Saving(
            session,
            described,
            custom_metadata=metadata,
            options=options,
            reuse=earlier,
            arrays=arrays,
            started=started,
        )
        session.begin(saving)
    try:
        saving.enter(replace=replace)
    except BaseException:
        saving.give_up()
        raise
    return saving


def _flatten(state: Any, metadata: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    flat, _ = keypaths.flatten(state)
    if flat and not (len(flat) == 1 and not flat[0][0] and keypaths.is_leaf(flat[0][1])):
        return flat
    if metadata:
        return []  # a part may hold metadata alone
    raise EmptyStateError(
        f"state {state!r} has no leaves, and there is no custom_metadata: there is nothing to save."
    )


def _describe(flat: Sequence[tuple[Any, Any]], options: SaveOptions) -> list[Described]:
    return [
        snapshot.describe(
            keypaths.from_jax(path),
            value,
            chunk_bytes=options.chunk_bytes,
            compression=options.compression,
        )
        for path, value in flat
    ]


class _Saving:
    """One save on its way. It ends in `run` or `give_up`, which give back all that it holds.

    An interrupt that comes while it ends leaves it in the session's books: `give_up_interrupted`
    finds it there, by the thread that has left it behind.
    """

    def __init__(
        self,
        session: "Session",
        described: list[Described],
        *,
        custom_metadata: dict[str, Any],
        options: SaveOptions,
        reuse: CheckpointPath | None,
        arrays: "Sequence[weakref.ref[Any] | None]",
        started: float,
    ) -> None:
        self.session = session
        self._thread: int | None = threading.get_ident()  # None: the background's
        self._begins = threading.Lock()  # held by whoever ends it: `run`, or what takes it back
        self._described = described
        self._leaves: list[Leaf] = []
        self._options = options
        self._reuse = reuse
        self._arrays = arrays  # of its leaves, those that may be remembered; none without `reuse`
        self._linked: dict[int, Leaf] = {}  # leaves that need not be copied, by position
        self._directory: Path | None = None
        self._reused_bytes = 0
        self._started = started
        self._instants = {"called_at": started}  # those of `SaveTimes`, on the monotonic clock
        self._part = Part(
            process=processes.index(),
            time_ns=0,
            custom_metadata=custom_metadata,
            leaves=(),
            bytes=sum(one.bytes for one in described),
            durable=options.durable,
        )
        self._name = ""
        self._needed_bytes = self._part.bytes  # on the disk, as far as it is known
        self._blocked_secs = 0.0  # of a save in the background; the other kind is all blocked
        self._budget_secs = 0.0
        self._is_counted = False  # in the memory budget

    def enter(self, *, replace: bool) -> None:
        """Enters the session, and claims the leaves."""
        session = self.session
        session.require_not_aborted()
        session.raise_unseen()
        leaves = [one.leaf for one in self._described]
        with storage.full_disk_explained(session.where, lambda: self._part.bytes):
            session.enter(leaves, durable=self._options.durable)
        time_ns = session.claim(leaves, replace=replace, claimed=self._leaves)
        self._part = dataclasses.replace(self._part, time_ns=time_ns)
        self._name = prefix_of_name(self._part) + uuid.uuid4().hex[:12]
        if self._reuse is not None and self._options.checksum:
            with storage.full_disk_explained(session.where, lambda: self._part.bytes):
                self._share_known(self._reuse)
        self._reach("entered_at")

    def _share_known(self, earlier: CheckpointPath) -> None:
        """Shares what holds arrays that still live: before the return, after which they may not.

        The disk is not waited for: no more is linked than needs no fsync.
        """
        durable = self._options.durable
        shared = _saved_arrays.shared_with(
            earlier.final, self._arrays, self._leaves, durable=durable
        )
        if not shared or not storage.has_contents(earlier.finalized):
            return
        self._directory = storage.create_part(self.session.where, self._name)
        self._linked = link_files(self._directory, shared, first_file=1, durable=False)
        for at, leaf in self._linked.items():
            self._reused_bytes += self._described[at].bytes
            self._described[at] = Described(leaf)

    def detach(self) -> None:
        """Makes what is to be written safe from the caller, within the memory budget."""
        limit = self._options.max_inflight_bytes
        self._is_counted = True
        copied_bytes = sum(one.bytes for one in self._described)
        self._budget_secs = _budget.acquire(self, copied_bytes, limit=limit)
        self._reach("admitted_at")
        with TraceAnnotation("flax_partial.snapshot"):
            self._described = snapshot.detach(self._described)
        self._reach("taken_at")
        if not self.note_if_computed():
            _uncomputed.append(self)
        self._blocked_secs = time.perf_counter() - self._started

    def hand_over(self) -> None:
        """Makes it the background's: an interrupt of this thread is none of the save any more."""
        self._thread = None

    def take_back(self) -> bool:
        """Keeps `run` from beginning; returns whether it had not."""
        self._thread = threading.get_ident()
        if self._begins.acquire(blocking=False):
            return True
        self._thread = None
        return False

    @property
    def is_left_behind(self) -> bool:
        """Whether an interrupt took its thread elsewhere: it is calling anew, or has ended."""
        return self._thread is not None and _is_gone(self._thread) and not _is_on_the_stack(self)

    def run(self) -> SaveReport:
        """Writes and commits the part."""
        began = self._reach("begun_at")
        if not self._begins.acquire(blocking=False):
            raise InterruptedError("The call that was to start this save was interrupted.")
        with storage.full_disk_explained(self.session.where, lambda: self._needed_bytes):
            try:
                self.session.require_not_aborted()
                first = self._leaves[0].name if self._leaves else ""
                with TraceAnnotation("flax_partial.save", first=first):
                    self._write()
            except BaseException:
                self.give_up()
                raise
        self._give_back()
        _note_computed()
        ended = time.perf_counter()
        times = self._times(ended)
        return SaveReport(
            path=self.session.where.final,
            part=self._name,
            leaves=len(self._leaves),
            bytes=self._part.bytes,
            reused_bytes=self._reused_bytes,
            blocked_secs=self._blocked_secs or ended - self._started,
            budget_secs=self._budget_secs,
            write_secs=ended - began,
            committed_at=times.committed_at,
            times=times,
        )

    def note_if_computed(self) -> bool:
        """Notes when the arrays were computed, if they are; returns whether."""
        is_computed = snapshot.is_computed(self._described)
        if is_computed:
            self._instants.setdefault("ready_at", time.perf_counter())
        return is_computed

    def _reach(self, name: str) -> float:
        """Notes that the save is at one of the instants of its report; returns the time."""
        now = self._instants[name] = time.perf_counter()
        return now

    def _times(self, now: float) -> SaveTimes:
        """The instants on the system's clock, which is read once: it may be set at any time."""
        at, epoch = self._instants, time.time() - now
        for name in ("admitted_at", "taken_at"):  # a `save` waits for neither
            at.setdefault(name, at["entered_at"])
        return SaveTimes(**{name: epoch + instant for name, instant in at.items()})

    def _write(self) -> None:
        directory = self._directory or storage.create_part(self.session.where, self._name)
        left = [at for at in range(len(self._leaves)) if at not in self._linked]
        data = self._host_data(left)
        durable = self._options.durable
        with TraceAnnotation("flax_partial.write"):
            written = write_part(
                directory,
                data,
                first_file=1 + max((leaf.file for leaf in self._linked.values()), default=0),
                earlier=self._earlier(),
                checksum=self._options.checksum,
                durable=durable,
            )
        self._reach("written_at")
        self._reused_bytes += sum(self._described[left[at]].bytes for at in written.reused)
        done = self._linked | dict(zip(left, written.leaves, strict=True))
        part = dataclasses.replace(self._part, leaves=tuple(done[at] for at in sorted(done)))
        table = encode_part(part)
        self._needed_bytes = written.bytes + len(table)
        has_data_file = bool(written.bytes or written.reused or self._linked)
        with TraceAnnotation("flax_partial.commit"):
            storage.commit_part(directory, table, has_data_file=has_data_file, durable=durable)
        self._reach("committed_at")
        self._remember(part)

    def _host_data(self, positions: Sequence[int]) -> list[tuple[Leaf, list[np.ndarray]]]:
        """Waits until some of the leaves are computed, and brings them into the host's memory."""
        with TraceAnnotation("flax_partial.wait"):
            snapshot.wait_until_computed(self._described)
        self._instants.setdefault("ready_at", time.perf_counter())
        _note_computed()
        with TraceAnnotation("flax_partial.copy"):
            data = [
                (
                    self._leaves[at],
                    [snapshot.to_host(source) for source in self._described[at].sources],
                )
                for at in positions
            ]
        self._reach("copied_at")
        return data

    def _remember(self, part: Part) -> None:
        """Has the next save know those of its arrays that live on."""
        if not any(self._arrays) or not self._options.checksum:
            return
        try:
            files = _data_files(self.session.where, {self._name: part})
        except OSError:  # no reason to fail a save that is committed
            return
        for array, leaf in zip(self._arrays, part.leaves, strict=True):
            file = files.get(data_part(self._name, leaf.file))
            if array is not None and file is not None:
                final = self.session.where.final
                _saved_arrays.remember(array, checkpoint=final, file=file, leaf=leaf)

    def _earlier(self) -> Earlier | None:
        return None if self._reuse is None else self.session.earlier(self._reuse)

    def give_up(self) -> None:
        """Leaves the session as it was before this save; can be called again if interrupted."""
        if self._name:
            self.session.remove(self._name)
        self.session.release(self._leaves)
        self._give_back()

    def give_up_unless_committed(self) -> None:
        """Ends a save that was left behind; it has happened whole, or not at all."""
        if self._name and storage.is_committed(self.session.where, self._name):
            self._give_back()
        else:
            self.give_up()

    def _give_back(self) -> None:
        self._described = []
        if self._is_counted:
            _budget.release(self, limit=self._options.max_inflight_bytes)
        self.session.leave(self)


# Saves in the background, in the order of their calls; bounded, should nobody look any more.
_uncomputed: deque[_Saving] = deque(maxlen=4096)
_noting = threading.Lock()


def _note_computed() -> None:
    """Looks at the saves that wait for a thread to write them: which are computed by now.

    Nothing in JAX tells when that is. The threads that write look whenever they come by; what was
    handed over later is computed later, as a rule, so that one that is not yet ends the look.
    """
    if _noting.acquire(blocking=False):
        try:
            while _uncomputed and _uncomputed[0].note_if_computed():
                _uncomputed.popleft()
        finally:
            _noting.release()


def _is_gone(thread: int) -> bool:
    """Whether a thread has left where it was: it is this one, which calls anew, or has ended."""
    living = {other.ident for other in threading.enumerate()} - {threading.get_ident()}
    return thread not in living


def _is_on_the_stack(saving: _Saving) -> bool:
    """Whether this thread is inside of a save: then the handler of a signal is calling."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - asked after interrupts only
    steps = {function.__code__ for function in (_Saving.enter, _Saving.detach, _Saving.run)}
    while frame is not None:
        if frame.f_code in steps and frame.f_locals["self"] is saving:
            return True
        frame = frame.f_back
    return False


class Session:
    """What this process knows of the unfinished checkpoint at one path.

    While saves are under way they share one lock of the directory: only the first has to take it.
    """

    def __init__(self, where: CheckpointPath) -> None:
        self.where = where
        self._aborting: int | None = None  # the thread that does so
        self._lock = threading.Lock()
        self._ledger = Ledger()
        self._anchor = -1  # a descriptor of the directory: while it is open its inode is not reused
        self._identity: tuple[int, int] | None = None
        self._is_synced = False  # whether this process has made the directories durable
        # Parts that failed saves have written and could not remove: they do not count.
        self.not_removed: frozenset[str] = frozenset()
        self._removing = threading.Lock()  # not `_lock`: who holds that may wait for finalize
        self._saves: set[_Saving] = set()  # on their way, from `begin` until `leave`
        self._directory_lock: storage.SessionLock | None = None
        self._exclusive: weakref.WeakSet[storage.ExclusiveLock] = weakref.WeakSet()
        self._last_time_ns = 0
        self._earlier: dict[CheckpointPath, Earlier | None] = {}
        self._looking = threading.Lock()  # who looks into an earlier checkpoint, once for all saves
        self._handles: set[workers.SaveHandle] = set()
        self._failed: list[workers.SaveHandle] = []

    def track(self, handle: workers.SaveHandle) -> None:
        """Remembers a save in flight until it is done, and one that failed until that is known."""
        with self._lock:
            self._handles.add(handle)
        handle.add_done_callback(self._untrack)

    def _untrack(self, handle: Any) -> None:
        with self._lock:
            self._forget_done([handle])

    def _forget_done(self, handles: Sequence[workers.SaveHandle]) -> None:
        """Whoever waits for a handle may be here before its own callback: both settle it, once."""
        for handle in handles:
            if handle in self._handles and handle.done():
                self._handles.discard(handle)
                if handle.has_failed:
                    self._failed.append(handle)

    def require_not_aborted(self) -> None:
        """Raises NoSessionError if the session was aborted."""
        if self.is_aborted:
            raise NoSessionError(
                f"The session of {self.where.final} was aborted before this part was written."
            )

    def end_saves(self) -> None:
        """Has saves that do not write yet fail, and waits for those that do.

        None of them may be under way when the session is forgotten: what takes its place reads
        from the disk which leaves are claimed.
        """
        self._aborting = threading.get_ident()
        self.wait()
        with self._lock:
            saves = list(self._saves)
        for saving in saves:
            while saving in self._saves and not saving.is_left_behind:
                time.sleep(_POLL_SECS)

    @property
    def is_aborted(self) -> bool:
        """Whether it is being dropped, or was."""
        return self._aborting is not None

    @property
    def is_left_aborted(self) -> bool:
        """Whether an interrupt has kept who aborts it from forgetting it."""
        return self._aborting is not None and _is_gone(self._aborting)

    def wait(self) -> None:
        """Waits for the saves in flight that this process had when it was called."""
        with self._lock:
            handles = list(self._handles)
        wait(handles)

    def raise_unseen(self) -> None:
        """Raises the error of a background save that nobody has asked for, once."""
        with self._lock:
            self._forget_done(list(self._handles))
            failed, self._failed = self._failed, []
        errors = [error for handle in failed if (error := handle.unseen_error())]
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"And another save of this session failed: {other!r}")
            errors[0].add_note(f"It was a save_async to {self.where.final} that failed.")
            raise errors[0]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing in flight, and no error to tell."""
        return not self._saves and not self._handles and not self._failed

    @property
    def is_stale(self) -> bool:
        """Whether the directory that this is about is gone."""
        if not self.is_idle:
            return False
        try:
            current = storage.identity(self.where.session)
        except OSError:  # such as a name that is too long: there never was a session
            return True
        return current is None or current != self._identity

    def begin(self, saving: _Saving) -> None:
        """Notes a save that is on its way; it ends in `leave`."""
        with self._lock:
            self._saves.add(saving)

    def give_up_interrupted(self) -> None:
        """Ends what an interrupt has left behind: nobody else would, and its lock would stay."""
        with self._lock:
            self._unlock_if_idle()
            saves, locks = list(self._saves), list(self._exclusive)
        for saving in saves:
            if saving.is_left_behind:
                saving.give_up_unless_committed()
        for lock in locks:
            if _is_gone(lock.thread):
                lock.release()

    def enter(self, leaves: Sequence[Leaf], *, durable: bool) -> None:
        """Locks the directory against finalize and abort, unless a save on its way has done so.

        Makes the directory if there is none, but not for leaves that are at odds with each other.
        """
        with self._lock:
            if self._directory_lock is None:
                self._enter_directory(leaves)
            if durable and not self._is_synced:
                storage.sync_session(self.where)
                self._is_synced = True

    def _enter_directory(self, leaves: Sequence[Leaf]) -> None:
        self.require_not_aborted()
        if not storage.is_session(self.where):
            Ledger().claim(leaves, replace=False, visible=lambda _: -1, claimed=[])
        lock = storage.lock_for_saving(self.where)
        try:
            if lock.identity != self._identity:
                self._take_over(lock)
            self.remove_failed()
        except BaseException:
            lock.release()
            raise
        self._directory_lock = lock

    def _take_over(self, lock: storage.SessionLock) -> None:
        """Makes the ledger that of a locked directory that this process has not saved into."""
        storage.prepare_session(self.where)
        self._is_synced = False
        self.not_removed = frozenset()
        self._close_anchor()
        self._ledger = Ledger()
        mine = read_parts(self.where, process=processes.index(), failed=self.not_removed)
        for part in mine.committed.values():
            self._ledger.load(part)
        self._anchor = lock.duplicate()
        self._identity = lock.identity

    def leave(self, saving: _Saving) -> None:
        """Ends a save; the last of those on their way unlocks the directory."""
        with self._lock:
            self._saves.discard(saving)
            self._unlock_if_idle()

    def exclusively(self) -> storage.ExclusiveLock:
        """Returns what keeps everybody else out of the session while it is entered."""
        lock = storage.ExclusiveLock(self.where)
        with self._lock:
            self._exclusive.add(lock)
        return lock

    def _unlock_if_idle(self) -> None:
        if not self._saves and self._directory_lock is not None:
            self._directory_lock.release()
            self._directory_lock = None

    def claim(self, leaves: Sequence[Leaf], *, replace: bool, claimed: list[Leaf]) -> int:
        """Claims leaves: into `claimed`, in their generations; returns the save's time, in ns."""
        with self._lock:
            visible = _VisibleGenerations(self.where)
            self._ledger.claim(leaves, replace=replace, visible=visible.of, claimed=claimed)
            self._last_time_ns = max(time.time_ns(), self._last_time_ns + 1)
            return self._last_time_ns

    def release(self, leaves: list[Leaf]) -> None:
        """Takes back the claims of a save that failed, and empties the list."""
        with self._lock:
            while leaves:
                self._ledger.release([leaves.pop()])

    def remove(self, part: str) -> None:
        """Removes what a failed save has written: now, or before it can be taken for saved."""
        with self._removing:
            self.not_removed |= {part}
            with contextlib.suppress(OSError):
                storage.remove_part(self.where, part)
            if not storage.may_have_table(self.where, part):  # it counts for nothing
                self.not_removed -= {part}

    def remove_failed(self) -> None:
        """Removes what failed saves of this process have left.

        Raises:
          OSError: It cannot be removed.
        """
        with self._removing:
            for part in sorted(self.not_removed):
                storage.remove_part(self.where, part)
                self.not_removed -= {part}

    def earlier(self, checkpoint: CheckpointPath) -> Earlier | None:
        """What this process's parts of a finalized checkpoint hold; None if there is none."""
        with self._looking:
            if checkpoint not in self._earlier:
                self._earlier[checkpoint] = _read_earlier(checkpoint)
            return self._earlier[checkpoint]

    def close(self) -> None:
        """Forgets everything but what is in flight."""
        with self._lock:
            self._earlier = {}
            self.not_removed = frozenset()
            self._close_anchor()
            self._ledger = Ledger()

    def _close_anchor(self) -> None:
        anchor, self._anchor, self._identity = self._anchor, -1, None
        if anchor >= 0:
            os.close(anchor)


class _VisibleGenerations:
    """Largest generation of each leaf in a session's parts, read from disk when first asked for."""

    def __init__(self, where: CheckpointPath) -> None:
        self._where = where
        self._largest: dict[str, int] | None = None

    def of(self, name: str) -> int:
        """Returns -1 for a leaf that no part holds."""
        if self._largest is None:
            self._largest = {}
            failed = failed_parts(self._where)
            for part in read_parts(self._where, failed=failed).committed.values():
                for leaf in part.leaves:
                    known = self._largest.get(leaf.name, -1)
                    self._largest[leaf.name] = max(known, leaf.generation)
        return self._largest.get(name, -1)


_sessions: dict[Path, Session] = {}
_sessions_lock = threading.Lock()


def _forget_all() -> None:
    """A forked child has none of its parent's threads: nothing of this is in flight there."""
    global _sessions_lock, _budget, _noting
    _sessions_lock, _budget, _noting = threading.Lock(), MemoryBudget(), threading.Lock()
    _sessions.clear()
    _uncomputed.clear()


os.register_at_fork(after_in_child=_forget_all)


@atexit.register
def _tell_unseen() -> None:
    """No call can raise the error of a save any more: it must not go without a word."""
    for session in list(_sessions.values()):
        try:
            session.raise_unseen()
        except BaseException as error:  # noqa: BLE001 - of any kind that saves raise
            _LOG.error(
                "flax_partial: a save to %s failed: %s: %s",
                session.where.final,
                type(error).__name__,
                error,
            )


def session_of(where: CheckpointPath) -> Session:
    """Returns what this process knows of a session; drops what it knows of sessions now gone."""
    with _sessions_lock:
        return _known_session(where)


def _known_session(where: CheckpointPath) -> Session:
    session = _sessions.get(where.final)
    if session is not None and session.is_left_aborted:
        session.close()
        session = None
    if session is None:
        for final, other in list(_sessions.items()):
            if other.is_stale:
                other.close()
                del _sessions[final]
        session = _sessions[where.final] = Session(where)
    session.give_up_interrupted()
    return session


def failed_parts(where: CheckpointPath) -> frozenset[str]:
    """Names of the parts that failed saves of this process could not remove: they do not count."""
    session = _sessions.get(where.final)
    return frozenset() if session is None else session.not_removed


def forget(session: Session, *, for_good: bool = False) -> None:
    """Forgets a session that was finalized; one that was aborted, with what is in flight."""
    session.close()
    with _sessions_lock:
        is_known = _sessions.get(session.where.final) is session
        if is_known and (session.is_idle or for_good):
            del _sessions[session.where.final]


def _read_earlier(checkpoint: CheckpointPath) -> Earlier | None:
    """Nothing that is wrong with an earlier checkpoint keeps a save from being written."""
    finalized = checkpoint.finalized
    try:
        if storage.has_contents(finalized):
            with collector.paused():
                parts = read_parts(finalized, process=processes.index()).committed
                return Earlier(parts, _data_files(finalized, parts))
    except (OSError, CorruptCheckpointError) as error:
        _LOG.warning("flax_partial: cannot reuse data of %s: %s", checkpoint.final, error)
    return None


def _data_files(where: CheckpointPath, parts: Mapping[str, Part]) -> dict[str, DataFile]:
    """The data files of some parts, as they are once finalized, each called as by `data_part`."""
    found = {}
    for name, part in parts.items():
        for number in data_file_bytes(part.leaves):
            file = data_part(name, number)
            size = storage.size_of_data(where, data_path(file))
            place = where.finalized.state / data_path(file)
            found[file] = DataFile(place, size, part.durable)
    return found
