"""A training run in one directory, as one process sees it.

Callbacks hand over groups of leaves, and learn of errors from `Member.failures`. Once a checkpoint
is closed, or its epoch has ended, it goes to the finalizer. One that lacks anything is dropped, or
left to the next run.
"""

from __future__ import annotations

import errno
import functools
import logging
import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

import jax

import flax_partial as fp
from flax_partial.callbacks import _directory
from flax_partial.callbacks._checkpoint import Checkpoint
from flax_partial.callbacks._finalizer import Finalizer
from flax_partial.callbacks._members import Behind, Members
from flax_partial.callbacks._metrics import is_misspelt, lacking
from flax_partial.callbacks._open_checkpoints import OpenCheckpoints
from flax_partial.callbacks._reports import BlockedTime
from flax_partial.callbacks._timeline import Recorder
from flax_partial.runs import liveness
from flax_partial.runs.directory import make

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from flax_partial.callbacks._leaves import Leaves
    from flax_partial.callbacks._member import Member
    from flax_partial.callbacks._preemption import Preemption
    from flax_partial.callbacks._restored import Closing
    from flax_partial.callbacks._tiers import Tiers
    from flax_partial.runs.directory import AnyPath

logger = logging.getLogger(__name__)

_OTHERS_SECS = 90.0  # for which other processes are waited for: before JAX ends all, at 100 s
_ROOM_SECS = 7 * 24 * 3600.0  # for as long other processes wait for the one that uploads
_LAST_HOOKS = ("on_train_end", "teardown")  # after which no thread may come to write the timeline

_runs_lock = threading.Lock()  # guards `_runs`
_runs: WeakSet[Run] = WeakSet()  # of this process


class Run:
    """The callbacks that save into one directory, and the checkpoints that they add to.

    Under `jax.distributed` every process has its own, for the same directory. A checkpoint is
    finalized when all processes have saved their part of it, and given up in all of them where a
    save fails in one.

    Attributes:
      directory: Holds a checkpoint a step.
      tiers: Where `directory` is only the local tier, the uploads from it; None elsewhere.
      preemption: Whether the process is to end.
      recorder: Records the timeline.
      finalizer: Finalizes and removes checkpoints.
      members: Its callbacks that train.
      open_checkpoints: Those that its callbacks still add to.
      has_begun: Whether it trains: from when it has recovered the directory until all has ended.
    """

    def __init__(
        self,
        directory: AnyPath,
        preemption: Preemption,
        timeout_secs: float | None,
        tiers: Tiers | None = None,
    ) -> None:
        self.directory = directory
        self.tiers = tiers
        self.preemption = preemption
        self.recorder = Recorder(directory)
        self._saves_timeout_secs = timeout_secs
        self._timeout_secs = _OTHERS_SECS if timeout_secs is None else timeout_secs
        self.finalizer = Finalizer(directory, self.recorder, self._timeout_secs, tiers)
        self.has_begun = False
        self._life = liveness.Life(directory)  # of several processes, the first one's
        # Guards all below. Nothing is waited for while it is held, but where a clock or the end of
        # the interpreter has the caller do it.
        self._lock = threading.RLock()
        behind = Behind(lambda: self.finalizer.is_behind or self._is_full, self._timeout_secs)
        self.members = Members(
            directory,
            preemption,
            self._lock,
            skips=lambda step: behind.skips(step, self._subject),
        )
        self.open_checkpoints = OpenCheckpoints(self.finalizer, self._lock)
        self._name = ""  # until `recover` gives it one
        self._blocked = BlockedTime()  # of the checkpoint that was opened last
        self._is_dismissed = False
        with _runs_lock:
            _runs.add(self)

    # Who saves, and when.

    def start(self, member: Member, step: int) -> None:
        """Joins a callback whose training begins, which ends this process's runs before it there.

        Args:
          member: The callback.
          step: The step that training goes on from.

        Raises:
          CheckpointInUseError: A run of another process lives there.
          OSError: The directory cannot be made, or written to.
        """
        self.members.join(member)
        self._is_dismissed = member.has_checked = False
        self.members.last_closed = step
        member.last_skipped = None
        error = self._begin(member)
        if error is not None:
            logger.error("Nothing can be saved into %s: %s", self.directory, error)
        if member.clock is not None:
            member.clock.start(f"{self._subject} {member.key}", step)
        if member.saves_on_preemption:
            self.preemption.watch(member.key, member.signals)

    def stop_listening(self, member: Member) -> None:
        """Stops listening for a callback: to SIGTERM, and to its clock."""
        self.preemption.unwatch(member.key)
        if member.clock is not None:
            member.clock.stop()

    def end(self, member: Member) -> None:
        """Waits for a callback no longer: its training has ended."""
        self.stop_listening(member)
        member.has_finished_step = False
        self.members.remove(member)
        self._end_life_if_over()

    def dismiss(self) -> None:
        """Ends all callbacks: another run of this process has begun in their directory."""
        self._is_dismissed = True
        for member in self.members:
            self.end(member)

    @property
    def _is_full(self) -> bool:
        return self.tiers is not None and self.tiers.is_full

    @property
    def places(self) -> tuple[AnyPath, ...]:
        """The directories that hold its checkpoints: the local tier comes first."""
        return (self.directory,) if self.tiers is None else (self.directory, self.tiers.remote)

    @property
    def _subject(self) -> str:
        return f"{self.directory.absolute()} {self._name}"

    # Before training.

    def recover(self, *, begins: bool = False) -> None:
        """Finalizes or drops what ended runs left in the directory; leaves one alone that lives.

        A run of this process may have failed without its callbacks being called. Where another one
        begins, it is over: its jobs are waited for, and its open checkpoints are left.

        Args:
          begins: Whether this run begins to train.

        Raises:
          CheckpointInUseError: It begins, and a run of another process lives there.
          ValueError: Not all processes see one local tier.
          OSError: The storage failed.
        """
        for other in self._others():
            if begins:
                other.dismiss()
            if other.has_begun and not begins:
                other.finalizer.wait()
            else:
                other.leave()
        self.finalizer.wait()
        live = {checkpoint.path for checkpoint in self.open_checkpoints}
        if self.tiers is not None:
            self.tiers.check_is_shared(begins=begins, timeout_secs=self._timeout_secs)
        self._name = _directory.recover(
            self.directory,
            self._life,
            live=live,
            begins=begins,
            timeout_secs=self._timeout_secs,
        )
        if self.tiers is not None:
            self._reconcile(self.tiers, begins=begins)
        self.has_begun = self.has_begun or begins
        self.members.rescued_step = self.members.ended_step = None
        self.recorder.begin(self._name)
        self.finalizer.sweep()

    def _reconcile(self, tiers: Tiers, *, begins: bool) -> None:
        """Tells which checkpoints of the two tiers belong together; the first process does."""

        def act(_: object) -> None:
            if self._life.has_begun or liveness.living(self.directory) is None:
                tiers.reconcile(begins=begins)

        subject = f"tiers {tiers.remote}"
        fp.agree(subject, ready=lambda: None, act=act, timeout_secs=self._timeout_secs)

    def go_on(self, step: int) -> None:
        """Goes on from the checkpoint of a step, which is kept until a newer one is finalized."""
        self.finalizer.resume(step)
        self.members.last_closed = step

    def discard_later(self, step: int, path: AnyPath | None = None) -> None:
        """Removes the checkpoints that are later than that of `step`, which is at `path`, if any.

        Raises:
          CheckpointInUseError: Another run lives in the directory; or one of them is being read.
        """
        other = None if self.has_begun else liveness.living(self.directory)
        if other is not None:
            raise fp.CheckpointInUseError(
                errno.EWOULDBLOCK, f"Another run trains there ({other})", str(self.directory)
            )
        for place in self.places:
            told = self._told_in(place, path)
            _directory.discard(place, step, told, timeout_secs=self._timeout_secs)
        if self.tiers is not None:
            self.tiers.discarded(step)

    def check_none_later(self, step: int, path: AnyPath | None = None) -> None:
        """Checks, in both tiers, that training may go on from a step; see `_directory`."""
        for place in self.places:
            _directory.check_none_later(place, step, self._told_in(place, path))

    def _told_in(self, place: AnyPath, path: AnyPath | None) -> AnyPath | None:
        """What to compare a place's checkpoint of the step with: nothing if it is the other's."""
        is_of_other = path is not None and path.parent in self.places and path.parent != place
        return None if is_of_other else path

    # While training.

    def add_blocked(self, secs: float, hook: str) -> None:
        """Counts time for which a hook, until now, has blocked training."""
        with self._lock:
            self._blocked.secs += secs
            step = self._blocked.step
        self.recorder.blocked(step, secs, hook)
        if hook in _LAST_HOOKS:
            self.recorder.flush()

    def check_is_newer(self, step: int) -> None:
        """Checks that a step can be saved.

        Raises:
          CheckpointExistsError: The directory holds this step, or a later one.
          OSError: The directory cannot be made.
        """
        make(self.directory)
        for place in self.places:
            _directory.check_is_newer(place, step)

    def open(self, member: Member, *, step: int, epoch: int) -> Checkpoint:
        """Returns the checkpoint of a step, which is new if no callback has saved into it yet.

        A new one waits until those before it are finalized: where training saves faster than the
        storage takes it, it slows down, instead of filling the memory with snapshots.

        Raises:
          ValueError: Another run of this process has begun in the directory since this one did.
          CheckpointInUseError: A run of another process lives there.
        """
        if self._is_dismissed:
            raise ValueError(
                f"Another callback has begun to save into {self.directory}, which ended this one. "
                "Give both of them one FinalizeHook (finalizer=), or use one callback."
            )
        error = None if self.has_begun else self._begin(member)
        with self._lock:
            known = self.open_checkpoints.get(step)
            if known is not None:
                return known
            self.open_checkpoints.settle(before=step)
            checkpoint = Checkpoint(
                self.directory / str(step),
                step=step,
                epoch=epoch,
                run_name=self._name,
                saves_timeout_secs=self._saves_timeout_secs,
                recorder=self.recorder,
            )
            self.open_checkpoints.add(checkpoint)
            self._blocked = checkpoint.blocked
        self.finalizer.wait([checkpoint], show_progress=member.shows_progress)
        try:
            if error is not None:
                raise error
            self._life.check()
            self._wait_for_room(step)
            checkpoint.before = _directory.check_is_newer(self.directory, step)
        except (fp.CheckpointExistsError, OSError) as failure:
            checkpoint.fail(failure, [member])
        return checkpoint

    def _wait_for_room(self, step: int) -> None:
        """Waits until the local tier may hold another checkpoint; all processes wait alike."""
        if self.tiers is None:
            return
        if jax.process_count() == 1:
            self.tiers.wait_for_room(step)
            return
        fp.agree(
            f"room {self._subject} {step}",
            ready=functools.partial(self.tiers.wait_for_room, step),
            act=lambda _: None,
            timeout_secs=_ROOM_SECS,
        )

    def close(
        self,
        member: Member,
        checkpoint: Checkpoint,
        groups: Mapping[str, Leaves],
        *,
        epoch: int,
        epoch_ends: bool,
        closing: Closing,
    ) -> None:
        """Saves the last groups of a callback; once all are done the checkpoint is closed.

        It is finalized at once if it has its score. Otherwise it waits for a validation: until the
        next step begins, or, where the step ends its epoch, until that has ended.

        Args:
          member: The callback that is done.
          checkpoint: What `open` returned.
          groups: Group to its leaves.
          epoch: The epoch under way, the first being 0.
          epoch_ends: Whether the step ends its epoch, whose metrics are yet to come.
          closing: What its last part stores beside arrays.
        """
        with self._lock:
            if not checkpoint.members:
                due = self.members.due(checkpoint.step, epoch, epoch_ends=epoch_ends)
                checkpoint.members = due | {member.key: member}
        checkpoint.save(member, groups, closing=closing)
        member.saved(checkpoint.step)
        self.members.last_closed = checkpoint.step
        if member.clock is not None:
            member.clock.saved()
        with self._lock:
            checkpoint.done.add(member.key)
            if not epoch_ends:
                self.open_checkpoints.finish_scored()

    def raise_failure(self, member: Member) -> None:
        """Raises the oldest error of a callback's checkpoints that was not raised before, if any.

        If that is of the step it saved last, which no other one saves, the step may be repeated.
        """
        failure = member.failures.take_first()
        if failure is not None:
            step, error = failure
            self._take_back(member, step)
            raise error

    def raise_logged(self, member: Member, step: int) -> None:
        """Raises the error of a step if it was only logged; that step, too, may be repeated."""
        failed, error = member.failures.logged or (None, None)
        if failed == step and error is not None:
            if self._take_back(member, step):
                member.failures.logged = None
            raise error

    def take_back_for_memory(self, member: Member, step: int) -> bool:
        """Whether a step may be saved again, which a device had no memory for copies of."""
        failed, error = member.failures.logged or (None, None)
        is_lost = failed == step and isinstance(error, fp.DeviceMemoryError)
        return is_lost and self._take_back(member, step)

    def _take_back(self, member: Member, step: int) -> bool:
        """Has a failed step saved again if no other callback, and no other process, saves it."""
        is_alone = jax.process_count() == 1 and set(self.members) <= {member}
        if not is_alone or step != member.last_saved:
            return False
        self.open_checkpoints.settle(before=step + 1)
        member.take_back()
        return True

    def tell_misspelt(self, member: Member, expected: Collection[str]) -> None:
        """Warns, after the first step, of a monitor that is probably meant to be another metric.

        Args:
          member: The callback.
          expected: Names of metrics that a validation will set.
        """
        names = {*self.open_checkpoints.metric_names, *expected}
        for monitor in member.retention.modes.keys() - names:
            if is_misspelt(monitor, names, expected):
                logger.warning("After the first step the monitor %s", lacking(monitor, {}, names))

    def check_monitor(self, member: Member) -> None:
        """Warns, at the end of the first epoch, of a monitor that is no metric of the trainer's."""
        with self._lock:
            names = (
                self.open_checkpoints.metric_names
                if member.has_checked
                else member.retention.modes.keys()
            )
            for monitor in member.retention.modes.keys() - names:
                member.warn_once(f"The first epoch had no score: {lacking(monitor, {}, names)}")

    # After training.

    @property
    def awaits_members(self) -> bool:
        """Whether callbacks that have not ended have yet to add to what others have saved."""
        with self._lock:
            awaited = [one.members.keys() - one.done for one in self.open_checkpoints]
            return any(keys and keys <= self.members.keys for keys in awaited)

    def say_what_is_finished(self, error: BaseException) -> None:
        """Logs what has to be written before training ends by an error: that may take a while."""
        open_ = [checkpoint.step for checkpoint in self.open_checkpoints]
        steps = {*self.finalizer.steps_under_way, *open_}
        if steps:
            logger.warning(
                "Training ended by %s; what is being saved of %s is finished first.",
                type(error).__name__,
                ", ".join(f"step {step}" for step in sorted(steps)),
            )

    def wait(self, *, show_progress: bool = False) -> None:
        """Finalizes what is closed, drops what is open, and waits until nothing is under way."""
        self.open_checkpoints.settle()
        self.finalizer.wait(show_progress=show_progress)
        self.finalizer.finish()
        if self.tiers is not None:
            self.tiers.wait()
        self.recorder.flush()

    def leave(self) -> None:
        """Waits for all saves and jobs, and leaves what is not finalized to the next run.

        Where a save has failed, the other processes learn it, as if its step had ended.
        """
        for checkpoint in self.open_checkpoints.take_all():
            checkpoint.wait()
            logger.warning("Left %s unfinished, for the next run.", checkpoint.path)
            checkpoint.tell_others()
        self.wait()
        self._end_life_if_over()

    def _end_life_if_over(self) -> None:
        with self._lock:
            if not (self.members or self.open_checkpoints or self.finalizer.steps_under_way):
                self.has_begun = False
                self._life.end()

    def _begin(self, member: Member) -> OSError | None:
        """Begins to train; returns why that fails, where the callback only logs what fails."""
        try:
            self.recover(begins=True)
        except OSError as error:
            if member.failures.are_raised or isinstance(error, fp.CheckpointInUseError):
                raise
            return error
        return None

    def _others(self) -> list[Run]:
        """Returns the other runs of this process in the same directory."""
        with _runs_lock:
            others = [run for run in _runs if run is not self]
        here = self.directory.resolve()
        return [run for run in others if run.directory.resolve() == here]
