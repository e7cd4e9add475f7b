"""One step's checkpoint while callbacks save into it, and how it is finalized.

A checkpoint is *open* while callbacks may add groups to it, and *closed* once all of them are done.
The first error decides: nothing more is saved then, and the checkpoint is never finalized.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import threading
import time
from collections import Counter
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.profiler import TraceAnnotation

import flax_partial as fp
from flax_partial.callbacks import _rows, _stacked
from flax_partial.callbacks._claims import Claims
from flax_partial.callbacks._reports import BlockedTime, CheckpointReport
from flax_partial.callbacks._restored import Closing
from flax_partial.callbacks._timeline import devices_of
from flax_partial.runs import completeness, liveness
from flax_partial.subtrees import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from flax_partial.callbacks._leaves import Leaves
    from flax_partial.callbacks._member import Member
    from flax_partial.callbacks._timeline import Recorder
    from flax_partial.callbacks.policies import Mode
    from flax_partial.runs.directory import AnyPath


class Checkpoint:
    """The checkpoint of one step while it is written; saves may come from any thread.

    Attributes:
      path: Where it will be.
      step: Its step.
      claims: The leaves saved into it.
      members: State key to each callback that saves into it; empty until the first closes it.
      done: State keys of those that have saved all their groups.
      before: The checkpoint before it, whose files it may share; None if there is none.
      blocked: For how long it has blocked training so far.
      error: Why it failed; None while it has not.
    """

    def __init__(
        self,
        path: AnyPath,
        *,
        step: int,
        epoch: int,
        run_name: str,
        saves_timeout_secs: float | None,
        recorder: Recorder,
    ) -> None:
        self.path = path
        self.step = step
        self.claims = Claims()
        self.members: dict[str, Member] = {}
        self.done: set[str] = set()
        self.before: AnyPath | None = None
        self.blocked = BlockedTime(step)
        self.error: BaseException | None = None
        self._epoch = epoch
        self._subject = f"checkpoint {path.absolute()} {run_name}"
        self._saves_timeout_secs = saves_timeout_secs
        self._recorder = recorder
        self._lock = threading.Lock()  # guards `error`, `_groups` and `_pieces`
        self._groups: dict[str, list[str]] = {}  # by state key, in the order of saving
        self._pieces: Counter[str] = Counter()
        # Written by the thread that saves a group, read by any.
        self._handles: list[tuple[Member, fp.SaveHandle]] = []
        self._saves: dict[str, fp.SaveHandle] = {}  # those of groups
        self._sizes: dict[str, int] = {}

    @property
    def is_closed(self) -> bool:
        """Whether all callbacks that save into it are done."""
        return bool(self.members) and self.members.keys() <= self.done

    @property
    def monitors(self) -> set[str]:
        """The metrics that are to score it."""
        return {name for member in self.members.values() for name in member.retention.modes}

    def save(
        self,
        member: Member,
        groups: Mapping[str, Leaves],
        *,
        closing: Closing | None = None,
    ) -> None:
        """Saves groups in the background; returns once their arrays may be donated.

        Leaves that another callback has saved are left out.

        Args:
          member: The callback.
          groups: Group to its leaves.
          closing: If the callback is done, what its last part stores beside arrays. It lists, for
            later processes, all groups that the callback saved, too.
        """
        claimed = {name: self.claims.take(member.key, leaves) for name, leaves in groups.items()}
        named = {self._unique(member, name): leaves for name, leaves in claimed.items() if leaves}
        saves = [
            _Save(group, leaves, completeness.saved(callback=member.key, group=group))
            for group, leaves in named.items()
        ]
        # In other processes, the same callback may have all there is to save.
        has_parts = bool(self.claims.names) or jax.process_count() > 1
        if closing is not None and (saves or has_parts):
            *_, last = saves = saves or [_Save("", [], {})]
            last.session.update(self._closing(member))
            last.closing = closing
        for together in _handed_over(saves, member.options):
            self._save_groups(member, together)

    def written(self) -> tuple[int, int]:
        """Returns how many bytes of how many, of those that this process saves, are written."""
        saves = list(self._saves.items())
        done = sum(self._sizes[group] for group, handle in saves if handle.done())
        return done, sum(self._sizes[group] for group, _ in saves)

    def wait(self) -> None:
        """Waits until no save is in flight; the first failure is in `error` then.

        That may be that none of them has ended for too long.
        """
        by_handle: dict[futures.Future[Any], Member] = {
            handle: member for member, handle in tuple(self._handles)
        }
        left = set(by_handle)
        while left:
            ended, left = futures.wait(left, self._saves_timeout_secs, futures.FIRST_COMPLETED)
            if not ended:
                error = fp.IncompleteCheckpointError(
                    f"For {self._saves_timeout_secs:g} s no save of this process has ended, of "
                    f"{len(left)} that are in flight: FinalizeHook(timeout_secs=) waits no longer."
                )
                self.fail(error, set(by_handle.values()))
                return
            for handle in ended:
                failure = handle.exception()
                if failure is not None:  # waiters may be woken before the handle's callbacks run
                    self.fail(failure, [by_handle[handle]])

    def fail(self, error: BaseException, members: Iterable[Member]) -> None:
        """Gives the checkpoint up; its first error is reported to these callbacks."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        error.add_note(f"This is about the checkpoint of step {self.step}, {self.path}.")
        for member in members:
            member.failures.add(self.step, error)

    def finalize(self, metrics: Mapping[str, float], *, timeout_secs: float) -> CheckpointReport:
        """Waits for all saves, in all processes, and finalizes.

        Args:
          metrics: Name to number, stored with the checkpoint.
          timeout_secs: For how many seconds to wait for other processes.

        Raises:
          EmptyStateError: No callback saved anything.
          IncompleteCheckpointError: Some process, or save, was not done in time.
          Exception: A save of some process, or finalize, failed. The session is left as it was.
        """
        began = [0.0]

        def save_all() -> list[str]:
            self._wait_well()
            if metrics:
                member = next(iter(self.members.values()))
                ranked_by = {"ranked_by": self._ranked_by} if self._ranked_by else {}
                scores = Closing(custom_metadata={"metrics": metrics}, training=ranked_by)
                self._save_groups(member, [_Save("", [], {}, scores)])
                self._wait_well()
            began[0] = time.perf_counter()
            return sorted(self.claims.names)

        self._agree(save_all, timeout_secs)
        finalize_secs = time.perf_counter() - began[0]
        finalized_at = time.time()
        saves = {group: handle.result() for group, handle in self._saves.items()}
        return CheckpointReport(
            path=self.path,
            step=self.step,
            epoch=self._epoch,
            saves=saves,
            bytes=fp.metadata(self.path).bytes,
            reused_bytes=sum(save.reused_bytes for save in saves.values()),
            metrics=metrics,
            blocked_secs=self.blocked.secs,
            write_secs=sum(save.write_secs for save in saves.values()),
            finalize_secs=finalize_secs,
            finalized_at=finalized_at,
        )

    def _wait_well(self) -> None:
        self.wait()
        if self.error is not None:
            raise self.error

    def tell_others(self) -> None:
        """Reports to the other processes, if any, that a save of this one has failed, if one has.

        It waits for none of them: they may have given up before, and never come to this step.
        """
        error = self.error
        if error is None or jax.process_count() == 1:
            return

        def fail() -> list[str]:
            raise error

        with contextlib.suppress(Exception):  # the error is known here
            self._agree(fail, timeout_secs=0)

    def _agree(self, ready: Callable[[], list[str]], timeout_secs: float) -> None:
        """Finalizes once all processes are ready, each of which has the names of its leaves.

        Thousands of processes may have a hundred thousand names each, and all the same ones: of
        those that have the same, one says which.
        """
        names: list[str] = []

        def digest_of_names() -> str:
            names[:] = ready()
            return hashlib.sha256("\0".join(names).encode(errors="surrogatepass")).hexdigest()

        def commit_or_ask(digests: Mapping[int, str]) -> list[int]:
            first = {digests[process]: process for process in sorted(digests, reverse=True)}
            if len(first) > 1:
                return sorted(first.values())
            commit({jax.process_index(): names})
            return []

        commit = functools.partial(self._commit, timeout_secs)

        asked: list[int] = fp.agree(
            self._subject, ready=digest_of_names, act=commit_or_ask, timeout_secs=timeout_secs
        )
        if asked:
            fp.agree(
                f"{self._subject} names",
                ready=lambda: names if jax.process_index() in asked else [],
                act=commit,
                timeout_secs=timeout_secs,
            )

    def _commit(self, timeout_secs: float, names: Mapping[int, Sequence[str]]) -> None:
        """Finalizes what all processes have saved, given the names of their leaves."""
        expected = sorted({name for of_one in names.values() for name in of_one})
        if not expected:
            raise fp.EmptyStateError("No callback had anything to save.")
        session = self.path.with_name(f"{self.path.name}.partial_save")
        if not liveness.wait_until_idle(session, timeout_secs):
            raise fp.IncompleteCheckpointError(
                f"After {timeout_secs:g} s another process still saved into {session}, which is "
                "left to the next run."
            )
        # It waits for no leaf: all are saved that there will be.
        fp.finalize(self.path, expect=expected, processes=[jax.process_index()], timeout_secs=0)

    @property
    def _ranked_by(self) -> dict[str, Mode]:
        """Metrics by which its callbacks rank checkpoints, each with its mode."""
        modes = (member.retention.modes for member in self.members.values())
        return {monitor: mode for of_one in modes for monitor, mode in of_one.items()}

    def _closing(self, member: Member) -> dict[str, Any]:
        groups = self._groups.get(member.key, [])
        return completeness.closing(self.members, callback=member.key, groups=groups)

    def _unique(self, member: Member, group: str) -> str:
        """Gives each save a name of its own: a group may come in several pieces."""
        with self._lock:
            self._pieces[group] += 1
            piece = self._pieces[group]
            name = group if piece == 1 else f"{group}#{piece}"
            self._groups.setdefault(member.key, []).append(name)
            return name

    def _save_groups(self, member: Member, saves: Sequence[_Save]) -> None:
        """Begins to save groups, or metadata alone; an error fails the checkpoint."""
        if self.error is not None:
            return
        try:
            with TraceAnnotation("flax_partial.save_async", group=",".join(s.group for s in saves)):
                handles = fp.save_each_async(
                    self.path,
                    [joined(_stacked.cut(save.leaves)) if save.leaves else {} for save in saves],
                    custom_metadata=[save.closing.custom_metadata for save in saves],
                    training=map(self._training, saves),
                    options=member.options,
                    reuse=self.before if member.reuse_unchanged else None,
                )
        except Exception as error:  # noqa: BLE001 - the callback decides what follows
            self.fail(error, [member])
            return
        for save, handle in zip(saves, handles, strict=True):
            self._handles.append((member, handle))
            if save.leaves:
                self._sizes[save.group] = sum(_bytes_of(leaf) for _, leaf in save.leaves)
                self._saves[save.group] = handle
            handle.add_done_callback(self._when_saved(member, save))

    def _when_saved(self, member: Member, save: _Save) -> Callable[[Future[fp.SaveReport]], None]:
        # Which must not keep the leaves.
        group, where, has_leaves = save.group, devices_of(save.leaves), bool(save.leaves)

        def finished(handle: Future[fp.SaveReport]) -> None:
            error = handle.exception()
            if error is not None:
                self.fail(error, [member])
            elif has_leaves:
                self._recorder.saved(self.step, group, where, handle.result())

        return finished

    def _training(self, save: _Save) -> dict[str, Any]:
        session = {"session": save.session} if save.session else {}
        return {"step": self.step, "epoch": self._epoch, **session, **save.closing.training}


@dataclass(slots=True)
class _Save:
    """What becomes one part: a group, or metadata alone.

    Attributes:
      group: The group; "" for none.
      leaves: Its leaves.
      session: What it says of the session.
      closing: What it stores beside arrays, if it is the callback's last.
    """

    group: str
    leaves: Leaves
    session: dict[str, Any]
    closing: Closing = Closing({}, {})  # noqa: RUF009 - frozen, of mappings that are not changed


def _handed_over(saves: Sequence[_Save], options: fp.SaveOptions) -> Iterable[Sequence[_Save]]:
    """Returns what each call saves: everything, but rows at their turn where memory is bounded.

    A row is cut out by the call that saves it, which may wait until those before it are written.
    """
    is_bounded = options.max_inflight_bytes is not None
    if is_bounded and any(isinstance(leaf, _rows.Row) for one in saves for _, leaf in one.leaves):
        return [[one] for one in saves]
    return [saves] if saves else []


def _bytes_of(leaf: Any) -> int:
    """Returns about how much of a leaf this process writes, in bytes."""
    if isinstance(leaf, _rows.Row):
        count: int = math.prod(leaf.value.shape[axis] for axis in leaf.axes)
        return _bytes_of(leaf.value) // count
    if isinstance(leaf, fp.Slice):
        return _bytes_of(leaf.value)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        devices: set[Any] = leaf.sharding.device_set
        return leaf.nbytes // len({device.process_index for device in devices})
    return int(getattr(leaf, "nbytes", 0))
