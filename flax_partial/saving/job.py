"""One save, from its claims to its commit.

`claim` and `hand_over` are the caller's: short steps in memory, which `release` undoes. The rest is
a worker's, and undoes itself where it fails.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from jax.profiler import TraceAnnotation

from flax_partial.distributed import agreement
from flax_partial.errors import clear_frames
from flax_partial.format.model import Leaf, Part, part_path
from flax_partial.format.tables import encode_part
from flax_partial.options import SaveOptions
from flax_partial.reports import SaveReport, SaveTimes
from flax_partial.saving import sharing, snapshot
from flax_partial.saving.describe import Described
from flax_partial.saving.device_copies import Copy
from flax_partial.saving.device_room import DeviceRoom
from flax_partial.saving.memory_budget import MemoryBudget
from flax_partial.saving.write import HostBoxes, link_held, write_part
from flax_partial.sessions import registry, workers
from flax_partial.sessions.handles import Handle, SaveHandle
from flax_partial.sessions.workers import Task
from flax_partial.storage.local_place import LocalPlace
from flax_partial.storage.parts import prefix_of_name
from flax_partial.storage.place import Place

_budget = MemoryBudget()
_room = DeviceRoom()


class SaveJob:
    """One save on its way."""

    def __init__(
        self,
        where: Place,
        described: Described,
        *,
        custom_metadata: dict[str, Any],
        training: dict[str, Any],
        options: SaveOptions,
        reuse: LocalPlace | None,
        started: float,
    ) -> None:
        self.session = registry.begin_save(where, self)
        self.is_background = False
        self.leaves: Sequence[Leaf] = described.leaves
        self.sources: snapshot.Boxes = described.sources
        self._sizes = described.sizes
        self._tree = described.tree
        self._arrays = described.arrays  # that may be remembered; none without `reuse`
        self.options = options
        self._reuse = reuse
        self._held: sharing.Held = []  # open files that hold some of them
        self._reused_bytes = 0
        self.started = started
        self._instants = {"called_at": started}  # those of `SaveTimes`, on the monotonic clock
        self._part = Part(
            process=agreement.index(),
            time_ns=0,
            custom_metadata=custom_metadata,
            training=training,
            leaves=(),
            bytes=sum(described.sizes),
            durable=options.durable,
        )
        self._name = ""
        self._needed_bytes = self._part.bytes  # on the disk, as far as it is known
        self._blocked_secs = 0.0  # of a save in the background; the other kind is all blocked
        self._budget_secs = 0.0
        self._device_bytes = 0
        self._copies: Sequence[Copy] = ()  # on devices
        self._moving: Task[None] | None = None  # of those to the host
        self.handle = SaveHandle()
        self.task: Task[SaveReport] = Task(
            self._run,
            self.handle,
            subject=self.session,
            withdrawn=self.release,
            skipped=self._skip,
        )

    # What the caller does.

    def claim(self, *, replace: bool) -> None:
        """Claims the leaves; errors of earlier saves in the background are raised first."""
        self.session.require_not_aborted()
        self.session.raise_unseen()
        tree = self._tree
        self.leaves, time_ns = self.session.claim(
            self, self.leaves, replace=replace, is_tree=tree.is_tree
        )
        tree.is_tree = True
        self._part = dataclasses.replace(self._part, time_ns=time_ns)
        if self._reuse is not None and self.options.checksum:
            self._held = sharing.hold_files(
                self._reuse, self._arrays, self.leaves, durable=self.options.durable
            )
            held = {at for one, _ in self._held for at in one.leaves}
            self._reused_bytes = sum(self._sizes[at] for at in held)
            self.sources = [() if at in held else boxes for at, boxes in enumerate(self.sources)]
        self._reach("entered_at")

    def keep_copies(self, sources: snapshot.Boxes, copies: Sequence[Copy]) -> None:
        """Has copies that were made on devices saved, in place of what they are copies of."""
        self.sources, self._copies = sources, copies
        self._device_bytes = sum(copied.size for copied in copies)

    def enter_budget(self) -> None:
        """Waits until what was not copied on a device fits into the memory budget."""
        self.is_background = True
        left = self._part.bytes - self._reused_bytes - self._device_bytes
        limit = self.options.max_inflight_bytes
        self._budget_secs = _budget.acquire(self, left, limit=limit)
        self._reach("admitted_at")

    def end_call(self, blocked_secs: float) -> None:
        """Has copies leave the devices; from here on the caller may do what it likes.

        Args:
          blocked_secs: For how long the save has held its caller.
        """
        self._blocked_secs = blocked_secs
        self._reach("taken_at")
        if self._copies:
            self.task.is_ready = False
            moving = self._moving = Task(lambda _: self._move(), Handle[None]())
            submit = partial(workers.moving.submit, moving)
            limit = self.options.max_inflight_bytes
            _budget.request(self, self._device_bytes, limit=limit, granted=submit)
        if not self.note_if_computed():
            _uncomputed.append(self)

    def _move(self) -> None:
        """Brings copies to the host; what has arrived is written while others are on the way."""
        _wait_for_a_pause()
        with contextlib.suppress(Exception):  # what failed fails again as it is written
            snapshot.move(self._copies, owner=self, room=_room, issued=self._end_moving)
        self._end_moving()

    def _end_moving(self) -> None:
        if not self.task.is_ready:
            self.task.is_ready = True
            workers.saving.wake()

    def release(self) -> None:
        """Gives back all that it holds in memory; can be called again if it is interrupted."""
        self._let_go()
        self.session.release(self)
        if self._moving is not None:
            self._moving.withdraw()
        self._end_moving()

    def _let_go(self) -> None:
        """Lets go of the snapshot."""
        self.sources = self._copies = ()
        held, self._held = self._held, []
        for _, file in held:
            file.close()
        _room.release(self)
        _budget.release(self, limit=self.options.max_inflight_bytes)

    def note_if_computed(self) -> bool:
        """Notes when the arrays were computed, if they are; returns whether."""
        is_computed = snapshot.is_computed(self.sources)
        if is_computed:
            self._instants.setdefault("ready_at", time.perf_counter())
        return is_computed

    # What a worker does.

    def _run(self, task: Task[SaveReport]) -> SaveReport:
        handled = sys.exception()  # by a caller whose own thread this is
        try:
            return self._commit(task)
        except BaseException as error:
            if self.is_background:
                self.session.fail(self.handle)  # before it may be forgotten for being idle
            self._skip()
            clear_frames(error, until=handled)  # who keeps it would keep what was to be written
            raise

    def _skip(self) -> None:
        """Undoes what was done for the save, as far as its caller was not interrupted in that."""
        self.release()
        self.session.skip()  # the lock may have been kept for it

    def _commit(self, task: Task[SaveReport]) -> SaveReport:
        """Writes and commits the part; what it has written is removed where it fails."""
        began = self._reach("begun_at")
        session = self.session
        with session.where.full_disk_explained(lambda: self._needed_bytes):
            session.require_not_aborted()
            task.check()
            is_committed = False
            try:
                with session.entered(durable=self.options.durable) as opened:
                    self._name = self._new_name(opened.mark)
                    try:
                        first = self.leaves[0].name if self.leaves else ""
                        with TraceAnnotation("flax_partial.save", first=first):
                            self._write(task)
                    except BaseException:
                        session.remove(self._name)
                        raise
                    is_committed = True
                    self._let_go()
            finally:  # until here the save is under way: nothing closes what is being unlocked
                if is_committed:
                    session.keep(self)
        note_computed()
        ended = time.perf_counter()
        times = self._times(ended)
        return SaveReport(
            path=session.where.final,
            part=self._name,
            leaves=len(self.leaves),
            bytes=self._part.bytes,
            reused_bytes=self._reused_bytes,
            blocked_secs=self._blocked_secs or ended - self.started,
            budget_secs=self._budget_secs,
            write_secs=ended - began,
            committed_at=times.committed_at,
            times=times,
            device_bytes=self._device_bytes,
        )

    def _new_name(self, mark: str) -> str:
        own_name = prefix_of_name(self._part) + mark + uuid.uuid4().hex[:12]
        return part_path(own_name, process=self._part.process, processes=agreement.count())

    def _write(self, task: Task[SaveReport]) -> None:
        new = self.session.where.create_part(self._name)
        durable = self.options.durable
        linked = link_held(new, self._held)
        left = [at for at in range(len(self.leaves)) if at not in linked]
        data = self._host_data(left)
        task.check()

        def check() -> None:
            task.check()
            self._note_arrival()

        with TraceAnnotation("flax_partial.write"):
            written = write_part(
                new,
                data,
                first_file=1 + len(self._held),
                earlier=sharing.find_earlier(self.session, self._reuse),
                checksum=self.options.checksum,
                durable=durable,
                check=check,
            )
        written_at = self._reach("written_at")
        for name in ("ready_at", "copied_at"):
            self._instants.setdefault(name, written_at)
        self._reused_bytes += sum(self._sizes[left[at]] for at in written.reused)
        done = linked | dict(zip(left, written.leaves, strict=True))
        part = dataclasses.replace(self._part, leaves=tuple(done[at] for at in sorted(done)))
        table = encode_part(
            dataclasses.replace(part, leaves=tuple(filter(_is_listed, part.leaves)))
        )
        self._needed_bytes = written.bytes + len(table)
        has_data_file = bool(written.bytes or written.reused or linked)
        task.check()  # the last chance: from here on the save happens
        with TraceAnnotation("flax_partial.commit"):
            new.commit(table, has_data_file=has_data_file, durable=durable)
        self._reach("committed_at")
        if self.options.checksum:
            sharing.remember(self.session.where, self._name, part, self._arrays)

    def _host_data(self, positions: Sequence[int]) -> HostBoxes:
        """Brings some of the leaves into the host's memory.

        What is on its way there, from a snapshot, is waited for as it is written.
        """
        with TraceAnnotation("flax_partial.wait"):
            if self._moving is not None and not self.task.is_ready:  # the interpreter is ending
                self._moving.wait()
            snapshot.wait_until_computed(self.sources, first=self.is_background)
            if not self.is_background:
                self.sources = snapshot.detach(self.sources, caller_waits=True)
        self.note_if_computed()
        note_computed()
        with TraceAnnotation("flax_partial.copy"):
            data = [(self.leaves[at], snapshot.OnTheWay(self.sources[at])) for at in positions]
        self._note_arrival()
        return data

    def _note_arrival(self) -> None:
        """Notes when all data of a snapshot is on the host, if it is."""
        if "copied_at" not in self._instants and self.note_if_computed():
            self._reach("copied_at")

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


def hand_over(jobs: Sequence[SaveJob]) -> None:
    """Makes what saves are to write safe from the caller, and has workers write it.

    What saves hand over together is copied and transferred by one call of JAX each. Only where the
    host's memory is bounded they come one after the other: each may wait for what those before it
    hold until it is written.
    """
    if not jobs:
        return
    with TraceAnnotation("flax_partial.snapshot"):
        _copy_on_devices(jobs)
    is_bounded = jobs[0].options.max_inflight_bytes is not None
    began = jobs[0].started
    for together in [[job] for job in jobs] if is_bounded else [jobs]:
        for job in together:
            job.enter_budget()
        with TraceAnnotation("flax_partial.snapshot"):
            detached = iter(snapshot.detach(chain.from_iterable(job.sources for job in together)))
            for job in together:
                job.sources = list(islice(detached, len(job.sources)))
        ended = _last_call[0] = time.perf_counter()
        for job in together:
            job.end_call((ended - began) / len(together))
        began = ended
        workers.saving.submit(*[job.task for job in together])


def _copy_on_devices(jobs: Sequence[SaveJob]) -> None:
    limit = jobs[0].options.max_device_bytes
    devices = snapshot.copying_devices(
        chain.from_iterable(job.sources for job in jobs), limit=limit
    )
    if not devices:
        return
    unknown = frozenset(device for device in devices if not _room.has_seen_steps(device))
    for job in jobs:
        for device, at, arrays in snapshot.arrays_on_each(job.sources, unknown):
            name = job.session.where.final.parent, job.leaves[at].name
            _room.note_save(device, name, session=job.session, arrays=arrays)
    copied = snapshot.copy([(job, job.sources) for job in jobs], room=_room, limit=limit)
    for job, (sources, copies) in zip(jobs, copied, strict=True):
        job.keep_copies(sources, copies)


def _is_listed(leaf: Leaf) -> bool:
    """Whether a part is to name a leaf: one that others write is in some parts only.

    Ten thousand processes that list a hundred thousand leaves each would write no data any more.
    """
    return bool(leaf.boxes or leaf.writers) or not leaf.is_array or agreement.index() == 0


# What runs beside calls takes the interpreter lock from them, 0.5 ms each. Copies can wait.
_PAUSE_SECS = 0.002
_MOST_PAUSE_SECS = 0.05
_last_call = [0.0]  # when the last one ended


def _wait_for_a_pause() -> None:
    """Waits until training makes no calls for a moment: it saves layer after layer."""
    end = time.perf_counter() + _MOST_PAUSE_SECS
    while (left := min(_last_call[0] + _PAUSE_SECS, end) - time.perf_counter()) > 0:
        time.sleep(left)


# Saves in the background, in the order of their calls; bounded, should no worker look any more.
_uncomputed: deque[SaveJob] = deque(maxlen=4096)
_noting = threading.Lock()


def note_computed() -> None:
    """Looks at the saves that wait for a worker: which are computed by now.

    JAX does not report when that is. The workers check it between two pieces of work; what was
    handed over later is computed later, as a rule, so that one that is not yet ends the check.
    """
    if _noting.acquire(blocking=False):
        try:
            while _uncomputed and _uncomputed[0].note_if_computed():
                _uncomputed.popleft()
        finally:
            _noting.release()


def _forget_all() -> None:
    """A forked child has none of its parent's threads."""
    global _budget, _noting, _room
    _budget, _noting, _room = MemoryBudget(), threading.Lock(), DeviceRoom()
    _uncomputed.clear()


os.register_at_fork(after_in_child=_forget_all)
