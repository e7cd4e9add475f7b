"""What a trainer calls of a callback.

The hooks are Lightning's, by name and signature; three calls are added, with which a trainer
streams.

Which step a layer belongs to: steps are counted as the trainer's `global_step` is when
`on_train_batch_end` is called, so step 1 is the first. What is streamed belongs to the batch under
way: its step is one more than `global_step` was when the batch began, no matter whether the trainer
counts before or after it streams.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flax_partial.callbacks._copies import Copyable
from flax_partial.callbacks._metrics import send

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from flax_partial.callbacks._member import Member
    from flax_partial.callbacks._metrics import OnMetrics
    from flax_partial.callbacks._restored import Progress
    from flax_partial.callbacks._run import Run
    from flax_partial.callbacks._saver import StepSaver
    from flax_partial.callbacks._stateful import Extras
    from flax_partial.callbacks.finalize_hook import FinalizeHook
    from flax_partial.subtrees import Name

logger = logging.getLogger(__name__)

_HookT = TypeVar("_HookT", bound="Callable[..., None]")


def in_training(hook: _HookT) -> _HookT:
    """Makes a hook do nothing while, after `setup`, there is no training."""

    @functools.wraps(hook)
    def run(self: TrainingHooks, *arguments: Any, **named: Any) -> None:
        if not self.is_idle:
            hook(self, *arguments, **named)

    return cast("_HookT", run)


class TrainingHooks(Copyable):
    """The hooks of a callback, which is made by its subclass out of a user's options.

    Attributes:
      expected_metrics: Names of metrics that a validation is known to set, from before the first.
    """

    expected_metrics: Collection[str] = ()
    finalizer: FinalizeHook
    restored: Progress | None = None
    is_idle = False
    _run: Run
    _member: Member
    _extras: Extras
    _saver: StepSaver
    _save_on_exception: bool
    _overwrite: bool
    _on_metrics: OnMetrics | None
    _step_before: int | None = None
    _is_training = False
    _has_ended_epoch = False  # of which no metric can come any more once something else begins

    def will_save(self, trainer: Any) -> bool:
        """Whether the step under way is saved: cheap enough to check at every layer."""
        step = self._step_before_batch(trainer) + 1
        epoch_ends = trainer.is_last_batch
        return not self.is_idle and self._saver.is_due(trainer, step, epoch_ends=epoch_ends)

    def on_layer_ready(self, trainer: Any, name: Name, tree: Any) -> None:
        """Saves a layer's parameters as they are after the step under way, if it is to be saved.

        Returns once the arrays may be donated, deleted or written over; they need not be computed
        yet. May be called from any thread, in any order, once a step for each name.

        Args:
          trainer: The trainer.
          name: Where the layer stands below "params", such as "blocks.3".
          tree: Its parameters.
        """
        self._stream(trainer, "params", name, tree)

    def on_optimizer_state_ready(self, trainer: Any, name: Name, tree: Any) -> None:
        """Saves a layer's optimizer state, as `on_layer_ready` does, below "opt_state"."""
        self._stream(trainer, "opt_state", name, tree)

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Joins the callbacks that share its hook, if there is training to come."""
        self.is_idle = stage != "fit" or bool(getattr(trainer, "fast_dev_run", False))
        if not self.is_idle:
            self._run.members.join(self._member)

    @in_training
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Finalizes or drops what an ended run has left.

        Raises:
          CheckpointExistsError: Training goes on from a step that was restored, and there are later
            ones.
          UnsupportedLeafError: The state of one of `extras` cannot be stored.
        """
        with self._blocked("on_fit_start", trainer):
            step = trainer.global_step
            self._extras.metadata()  # what is wrong with them is raised now
            if self.restored is not None and self.restored.step == step > 0:
                if not self._overwrite:
                    self._run.check_none_later(step)
            elif step != self._member.last_saved:
                self._saver.epoch_began = step
            self._step_before = step
            self._run.start(self._member, step)
            if self._overwrite:
                self._run.discard_later(step or -1)
            self._look(trainer)
            self._is_training = True

    @in_training
    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Remembers the step that training, restored by now, starts from.

        Saves the state, if it is to be saved at step 0.
        """
        with self._blocked("on_train_start", trainer):
            step = trainer.global_step
            self._step_before = step
            self._look(trainer)
            if step == 0 and self._saver.is_due(trainer, step, epoch_ends=False):
                self._saver.save(trainer, module, epoch_ends=False)

    @in_training
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Remembers the step before the batch; finalizes it if it was waiting for its score."""
        self._step_before = trainer.global_step
        self._look(trainer)
        self._tell_of_monitor()
        self._run.open_checkpoints.finish_closed()
        self._run.recorder.step_began()

    @in_training
    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves what was not streamed of a step that is to be saved."""
        with self._blocked("on_train_batch_end", trainer):
            step, member = trainer.global_step, self._member
            self._tell_of_monitor()
            is_new = step not in (self._step_before, member.last_saved)
            is_first = is_new and self._step_before is not None and not member.has_checked
            if is_first:
                self._saver.check(trainer, module, step)
                member.has_checked = True
            self._run.open_checkpoints.settle(before=step)
            self._look(trainer)
            if is_first:
                self._run.tell_misspelt(member, self.expected_metrics)
            self._reach(step, "on_train_batch_end")
            if self._saver.is_due(trainer, step, epoch_ends=trainer.is_last_batch):
                self._saver.save(trainer, module, epoch_ends=trainer.is_last_batch)
            if self._save_on_exception:
                self._saver.remember(trainer, module)
            self._step_before = step
            self._run.recorder.step_ended(step)
            self._stop_after_last(trainer, module)

    @in_training
    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Scores the checkpoint of the last finished step, if it was waiting for that."""
        self._look(trainer)
        if not trainer.is_last_batch:
            self._run.open_checkpoints.finish_scored()

    @in_training
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Finalizes; saves first where no batch was marked as the epoch's last."""
        with self._blocked("on_train_epoch_end", trainer):
            step = trainer.global_step
            self._look(trainer)
            self._reach(step, "on_train_epoch_end")
            if self._saver.is_due(trainer, step, epoch_ends=True):
                self._saver.save(trainer, module, epoch_ends=True)
            self._run.open_checkpoints.finish_scored()
            self._has_ended_epoch = True
            self._saver.epoch_began = step
            self._stop_after_last(trainer, module)

    @in_training
    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Waits until every checkpoint is finalized that other callbacks do not add to yet."""
        with self._blocked("on_train_end", trainer):
            step = trainer.global_step
            self._look(trainer)
            self._tell_of_monitor()
            self._reach(step, "on_train_end")
            run, member = self._run, self._member
            run.members.ended_step = step
            is_last = member.saves_on_preemption and run.preemption.is_due(step)
            is_last = is_last or member.last_skipped is not None
            if is_last and step not in (0, member.last_saved):
                self._saver.save(trainer, module, epoch_ends=False)
            waits = not run.awaits_members  # else the last of them waits
            try:
                if waits:
                    self._finish(trainer, module)
                self._stop_after_last(trainer, module)
            finally:
                self._end(waits=waits)

    @in_training
    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Lets saves in flight finish, and leaves what is not finalized to the next run.

        With `save_on_exception` it saves the last finished step before, if that can be had.
        """
        self._is_training = False
        self._run.stop_listening(self._member)
        self._run.say_what_is_finished(exception)
        if self._save_on_exception:
            self._saver.rescue()
        self._run.end(self._member)
        self._saver.forget()
        if not (self._save_on_exception and self._run.awaits_members):
            self._run.leave()
        self._member.failures.log_all()
        try:
            self._send_costs(trainer)
        except Exception:
            logger.exception("The metrics of finalized checkpoints could not be reported.")

    @in_training
    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Waits until every checkpoint is finalized."""
        with self._blocked("teardown", trainer):
            self._end()

    @property
    def state_key(self) -> str:
        """Identifies this callback among others, in a trainer and in a checkpoint."""
        return self._member.key

    def state_dict(self) -> dict[str, Any]:
        """Returns what a trainer's own checkpoint has to hold of this callback."""
        return {"last_saved": self._member.last_saved, "failed_saves": self._member.failures.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._member.last_saved = state_dict["last_saved"]
        self._member.failures.count = state_dict["failed_saves"]

    @contextlib.contextmanager
    def _blocked(self, hook: str, trainer: Any = None) -> Iterator[None]:
        """Counts the time that a hook blocks training; raises in it what has failed meanwhile.

        Then reports, if given a trainer, what has been finalized.
        """
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._run.add_blocked(time.perf_counter() - begun, hook)
        self._run.raise_failure(self._member)
        if trainer is not None:
            self._send_costs(trainer)

    def _stream(self, trainer: Any, root: str, name: Name, tree: Any) -> None:
        if not self.will_save(trainer):
            if not (self.is_idle or self._member.has_checked):
                self._saver.note_streamed(root, name)
            return
        with self._blocked("stream"):
            self._saver.stream(trainer, self._step_before_batch(trainer) + 1, root, name, tree)

    def _step_before_batch(self, trainer: Any) -> int:
        if self._step_before is None:
            self._step_before = int(trainer.global_step)
        return self._step_before

    def _look(self, trainer: Any) -> None:
        self._run.open_checkpoints.look(trainer.global_step, trainer.callback_metrics)

    def _tell_of_monitor(self) -> None:
        if self._has_ended_epoch:
            self._run.check_monitor(self._member)
            self._has_ended_epoch = False

    def _reach(self, step: int, hook: str) -> None:
        if self._member.saves_on_preemption:
            self._run.preemption.reach(step, hook)

    def _stop_after_last(self, trainer: Any, module: Any) -> None:
        """Finalizes and stops training once all callbacks have saved the last step."""
        member, preemption = self._member, self._run.preemption
        if member.saves_on_preemption and preemption.is_last(member.key, trainer.global_step):
            self._finish(trainer, module)
            for run in self.finalizer.runs:
                run.wait(show_progress=member.shows_progress)
            preemption.stop(trainer)

    def _finish(self, trainer: Any, module: Any) -> None:
        """Waits until every checkpoint is finalized.

        The newest step is saved a second time if a device had no memory for copies of it.
        """
        run, member = self._run, self._member
        run.wait(show_progress=member.shows_progress)
        if run.take_back_for_memory(member, trainer.global_step):
            self._saver.save_again(trainer, module)
            run.wait(show_progress=member.shows_progress)

    def _end(self, *, waits: bool = True) -> None:
        self._is_training = False
        if waits:
            self._run.wait(show_progress=self._member.shows_progress)
        self._run.end(self._member)
        self._saver.forget()

    def _send_costs(self, trainer: Any) -> None:
        """Sends each finalized checkpoint's cost once: to this callback's function, or loggers."""
        reader = "the trainer" if self._on_metrics is None else self._member.key
        for report in self._run.finalizer.new_reports(reader):
            send(report, trainer, self._on_metrics)
