"""A plain `for` loop, as a context manager: restore, then report each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from flax_partial.callbacks._options import LoopOptions, explicit
from flax_partial.callbacks._state import RestoreOptions
from flax_partial.callbacks.loop import Loop, LoopCheckpoint
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from flax_partial.subtrees import Name

StateT = TypeVar("StateT")


class checkpointing(LoopCheckpoint):  # noqa: N801 - it is read as the verb of a `with` statement
    """Checkpoints a loop of your own.

        with checkpointing("runs/lm", every_n_train_steps=100) as ckpt:
            state = ckpt.restore(state)
            for step in range(ckpt.steps_done, 1000):
                state, loss = train(state, batches[step])
                ckpt.step(state, metrics={"loss": loss})

    Where the block is left, its checkpoints are finalized: left well, the last step is saved too,
    unless `every_n_epochs=None`; left by an exception, Ctrl-C included, saves in flight finish, and
    the next run goes on from the newest checkpoint that is whole. The exception goes on.

    In a notebook, where a loop is spread over cells, `close` ends what the block would end.
    """

    @explicit(LoopOptions, PartialCheckpointCallback.__init__)
    def __init__(self, directory: str | os.PathLike[str], **options: Unpack[LoopOptions]) -> None:
        """Prepares it; nothing is written before the block is entered.

        A loop that never calls `end_epoch` is one epoch as a whole.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          options: What else `PartialCheckpointCallback` takes, but for `state_fn`.

        Raises:
          TypeError: There is no such option.
          ValueError: An option has a value that makes no sense, alone or with another.
        """
        self._loop = Loop(directory, lambda: self._state, options)
        self._state: Any = None  # None until the loop has given one

    @property
    def steps_done(self) -> int:
        """Steps done so far, those before the restored checkpoint included."""
        return self._loop.trainer.global_step

    @property
    def epochs_done(self) -> int:
        """Epochs done so far: those that `end_epoch` was called for."""
        return self._loop.trainer.current_epoch

    @property
    def step_in_epoch(self) -> int:
        """Steps done so far in the epoch under way: which of its batches comes next."""
        return self.steps_done - self.callback.epoch_began

    @explicit(RestoreOptions, PartialCheckpointCallback.restore)
    def restore(self, state: StateT, **options: Unpack[RestoreOptions]) -> StateT:
        """The newest checkpoint's state, or `state` as it is where there is none yet.

        Training goes on from there: `steps_done`, `epochs_done` and `step_in_epoch` are what they
        were. What is only to be looked at is loaded by `fp.load`.

        Args:
          state: What to load, in shape: it decides structure, dtypes and shardings. NNX objects in
            it are updated in place.
          options: What `PartialCheckpointCallback.restore` takes beside the target.

        Raises:
          TargetMismatchError: The checkpoint does not fit; nothing was updated.
          CheckpointExistsError: It is older than the newest, and `discard_later` is False.
        """
        self._state = state
        restored = self._loop.restore(state, **options)
        if restored is not None:
            self._state = restored
        return cast("StateT", self._state)

    def step(
        self,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        *,
        custom_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Reports that a step is done, and saves `state` if it is to be saved.

        Returns once the state may be donated to the next step; it need not be computed yet. What
        failed in the background since the call before is raised here. A call that raises has not
        counted the step: it may be repeated.

        Args:
          state: The state after the step: a tree of arrays, in which NNX objects may stand.
          metrics: What `monitor` may rank by; the numbers of it are stored with the checkpoint.
          custom_metadata: JSON values that are stored with this step's checkpoint, beside those
            that were given for the whole run.
        """
        self._state = state
        self._loop.step(self.steps_done + 1, metrics, custom_metadata=custom_metadata)

    def save_now(self) -> Path:
        """Saves the state as it is after the newest step, due or not, and waits until that is done.

        Before the first step, that is the state that was passed to `restore`, as step 0.

        Returns:
          The checkpoint's path.

        Raises:
          ValueError: There is no state yet: neither `restore` nor `step` was called.
          CheckpointExistsError: The directory holds this step, or a later one, of another run.
        """
        if self._state is None:
            raise ValueError(
                f"{type(self).__name__}.save_now() knows no state yet: call restore(state) or "
                "step(state) first."
            )
        return self._loop.save_now()

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds to the metrics of the step that was done last, such as those of a validation.

        Where its checkpoint lacks its score it has waited for that; it waits until the next `step`.

        Args:
          metrics: As of `step`.
        """
        self._loop.add_metrics(metrics)

    def end_epoch(self, epoch: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Reports that an epoch is done, the first being 0, and saves if it is to be saved.

        Args:
          epoch: Which one.
          metrics: Those of the whole epoch, as of `step`; they add to those of its last step.
        """
        self._loop.end_epoch(epoch, metrics)

    def layer_ready(self, name: Name, tree: Any) -> None:
        """Saves a layer's new parameters before the step is done; free if it is not saved."""
        self.callback.on_layer_ready(self._loop.trainer, name, tree)

    def optimizer_state_ready(self, name: Name, tree: Any) -> None:
        """Saves a layer's new optimizer state, likewise."""
        self.callback.on_optimizer_state_ready(self._loop.trainer, name, tree)
