"""What the adapters share: a trainer for the callback, and the callback's hooks in their order.

The callback reads six attributes of a trainer: `global_step`, `current_epoch`, `callback_metrics`,
`is_last_batch`, `state`, and, if it has that, `custom_metadata`. A loop that lacks them has an
adapter, which reports to a `Loop` what the loop has done.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

import flax_partial as fp
from flax_partial.callbacks._copies import Copyable
from flax_partial.callbacks._state import RestoreOptions
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from flax_partial.callbacks._options import LoopOptions

logger = logging.getLogger(__name__)


class LoopTrainer:
    """What the callback reads of a trainer.

    Attributes:
      global_step: Steps done, those of earlier runs included.
      current_epoch: The epoch under way, the first being 0.
      callback_metrics: Newest value of each metric, possibly still being computed.
      is_last_batch: Whether the step ends its epoch.
      custom_metadata: What is stored with the step's checkpoint, beside what the run's have.
    """

    def __init__(self, take_state: Callable[[], Any]) -> None:
        self.global_step = 0
        self.current_epoch = 0
        self.callback_metrics: dict[str, Any] = {}
        self.is_last_batch = False
        self.custom_metadata: Mapping[str, Any] = {}
        self._take_state = take_state

    @property
    def state(self) -> Any:
        """The tree to save; called in steps that are saved only."""
        return self._take_state()


class Loop:
    """A callback whose hooks are called as the loop goes on.

    Attributes:
      checkpoints: The callback.
      trainer: What it reads.
      is_running: Whether the loop has started, and not ended.
      has_ended: Whether it has ended, and not started again: what is restored then is looked at.
      is_in_block: Whether the loop stands in a `with` block, which ends it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        take_state: Callable[[], Any],
        options: LoopOptions,
    ) -> None:
        """Prepares a callback; nothing is written before the loop starts.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          take_state: Returns the tree to save, in which NNX objects may stand.
          options: What else `PartialCheckpointCallback` takes.
        """
        self.checkpoints = PartialCheckpointCallback(directory, **options)
        self.trainer = LoopTrainer(take_state)
        self.is_running = False
        self.has_ended = False
        self.is_in_block = False
        self._has_epochs = self._has_steps = False

    def start(self, step: int) -> None:
        """Begins, with so many steps done, and recovers what an ended run left."""
        self.trainer.global_step = step
        self.trainer.callback_metrics = {}
        self.trainer.is_last_batch = self._has_epochs = self._has_steps = False
        self.checkpoints.setup(self.trainer, None, "fit")
        self.checkpoints.on_fit_start(self.trainer, None)
        self.is_running, self.has_ended = True, False

    def restore(self, target: Any, **options: Unpack[RestoreOptions]) -> Any:
        """Goes on at a checkpoint, and returns its state; None where there is none yet.

        A loop that has ended is not started again by that: any checkpoint may be looked at.
        """
        if not self.has_ended:
            self._start_if_new()
        restored = self.checkpoints.restore(target, **options)
        if restored is not None:
            _, self.trainer.global_step = restored
            if self.checkpoints.restored is not None:
                self.trainer.current_epoch = self.checkpoints.restored.epochs_done
        self.begin()
        return None if restored is None else restored[0]

    def begin(self) -> None:
        """Reports that training begins, from what was restored or from the start."""
        if self.is_running:
            self.checkpoints.on_train_start(self.trainer, None)

    def save_now(self) -> Path:
        """Saves the newest step, and returns its checkpoint's path once that is finalized."""
        self._start_if_new()
        return self.checkpoints.save_now(self.trainer)

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None,
        *,
        is_last_batch: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Reports that a step has ended, and how many are done now: as before where it raises."""
        self._start_if_new()
        self.trainer.custom_metadata = dict(custom_metadata or {})
        self._has_steps = True
        before, self.trainer.global_step = self.trainer.global_step, step
        self.trainer.is_last_batch = is_last_batch
        self.trainer.callback_metrics = dict(metrics or {})
        try:
            self.checkpoints.on_train_batch_end(self.trainer, None, None, None, step)
        except Exception:
            self.trainer.global_step = before
            raise

    def begin_step(self) -> None:
        """Reports that the next step begins: no more metrics will come for the one before."""
        if self.is_running:
            step = self.trainer.global_step
            self.checkpoints.on_train_batch_start(self.trainer, None, None, step)

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Reports more metrics of the step that ended last, such as those of a validation."""
        self.trainer.callback_metrics = {**self.trainer.callback_metrics, **metrics}
        self.checkpoints.on_validation_end(self.trainer, None)

    def end_epoch(self, epoch: int, metrics: Mapping[str, Any] | None) -> None:
        """Reports that an epoch is done; its metrics add to those of its last step."""
        self._has_epochs = True
        self.trainer.current_epoch = epoch
        self.trainer.is_last_batch = True
        if metrics is not None:
            self.trainer.callback_metrics = dict(metrics)
        self.checkpoints.on_train_epoch_end(self.trainer, None)
        self.trainer.current_epoch = epoch + 1
        self.trainer.is_last_batch = False

    def close(self, error: BaseException | None) -> None:
        """Ends, or fails if there is an `error`; nothing is left running, even where ending fails.

        A loop that has reported no epoch is one as a whole, which ends here.
        """
        if not self.is_running:
            return
        self.is_running, self.has_ended = False, True
        try:
            if error is None and self._has_steps and not self._has_epochs:
                self.end_epoch(self.trainer.current_epoch, None)
            if error is None:
                self.checkpoints.on_train_end(self.trainer, None)
        except BaseException as failure:
            error = failure
            raise
        finally:
            if error is not None:
                self.checkpoints.on_exception(self.trainer, None, error)

    def _start_if_new(self) -> None:
        if self.is_running:
            return
        if not self.is_in_block:
            logger.warning(
                "The loop that saves into %s is not in a `with` block: call close() where training "
                "ends, which saves and finalizes what is left.",
                self.checkpoints.directory,
            )
        self.start(self.trainer.global_step)


def resume_options(resume: object) -> RestoreOptions | None:
    """Takes `resume=` of the loops that restore by themselves; None if they are not to.

    Raises:
      TypeError: It is something else, or `restore` has no such option.
    """
    if isinstance(resume, bool):
        return RestoreOptions() if resume else None
    known = RestoreOptions.__optional_keys__
    if not isinstance(resume, dict) or resume.keys() - known:
        raise TypeError(
            f"resume={resume!r}: it must be a bool, or a dict of what `restore` takes: "
            f"{', '.join(sorted(known))}."
        )
    return cast("RestoreOptions", resume)


@contextlib.contextmanager
def resuming() -> Iterator[None]:
    """Adds to errors how a loop that restores by itself is given the options they name."""
    try:
        yield
    except (fp.TargetMismatchError, fp.CheckpointExistsError) as error:
        error.add_note("Options are given where the callback is made, as resume={'cast': True}.")
        raise


class LoopCheckpoint(Copyable):
    """Base of every adapter: owns a callback, and is a context manager around the loop.

    Where the block ends well, it waits until every checkpoint is finalized. Where it ends by an
    exception, Ctrl-C included, saves in flight finish, the rest is left to the next run, and the
    exception goes on.
    """

    _loop: Loop

    @property
    def callback(self) -> PartialCheckpointCallback:
        """The callback that saves, with its `reports`, `directory` and all else."""
        return self._loop.checkpoints

    def close(self) -> None:
        """Ends the loop, as the end of a `with` block does; again, it does nothing.

        For notebooks, where a loop is spread over cells.

        Raises:
          Exception: What failed in the background, and was not raised before.
        """
        self._loop.close(None)

    def __enter__(self) -> Self:
        """Begins the block; nothing is written before the first step."""
        self._loop.is_in_block = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the block, and the loop where it has not ended yet."""
        self._loop.is_in_block = False
        self._loop.close(error)
