"""blaxbird: a hook for `train_fn`, which calls it after each step.

blaxbird needs nothing of a hook but to be callable, so nothing of blaxbird is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from flax_partial.callbacks._options import LoopOptions, explicit
from flax_partial.callbacks._state import RestoreOptions
from flax_partial.callbacks.loop import Loop, LoopCheckpoint
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping


class BlaxbirdCheckpoint(LoopCheckpoint):
    """Checkpoints the model and optimizer that blaxbird trains.

        with BlaxbirdCheckpoint("runs/lm", every_n_train_steps=100) as checkpoints:
            done = checkpoints.restore(optimizer)
            train = train_fn(fns=..., n_steps=1000 - done, ..., hooks=[checkpoints])
            train(key, optimizer, batches[done:], validation)

    blaxbird counts from 1 in each run, and makes its random keys from that count: the hook goes on
    counting where the checkpoint stopped, but only a model that uses no random key ends as it would
    have without a stop.
    """

    @explicit(LoopOptions, PartialCheckpointCallback.__init__, every_n_epochs=None)
    def __init__(self, directory: str | os.PathLike[str], **options: Unpack[LoopOptions]) -> None:
        """Prepares a hook; nothing is written before training begins.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          options: What else `PartialCheckpointCallback` takes, such as `every_n_train_steps`;
            `train_fn` has no epochs.

        Raises:
          TypeError: There is no such option.
          ValueError: An option has a value that makes no sense, or nothing would ever be saved.
        """
        self._loop = Loop(directory, lambda: self._state, options)
        self._state: Any = None
        self._steps_before = 0  # this run
        self._step_of_run = 0

    @explicit(RestoreOptions, PartialCheckpointCallback.restore)
    def restore(self, optimizer: Any, **options: Unpack[RestoreOptions]) -> int:
        """Restores the optimizer, and the model in it, from the newest checkpoint, in place.

        Args:
          optimizer: An NNX optimizer that holds its model.
          options: What `PartialCheckpointCallback.restore` takes beside the target.

        Returns:
          Steps done: 0 where there is no checkpoint yet.

        Raises:
          TargetMismatchError: The checkpoint does not fit; nothing was updated.
          CheckpointExistsError: It is older than the newest, and `discard_later` is False.
        """
        self._state = _state_of(optimizer.model, optimizer)
        self._loop.restore(self._state, **options)
        self._steps_before, self._step_of_run = self._loop.trainer.global_step, 0
        return self._steps_before

    def __call__(
        self, step: int, *, model: Any, optimizer: Any, metrics: Mapping[str, Any]
    ) -> None:
        """Saves the step if it is to be saved; returns once the state may be donated.

        Args:
          step: Steps done in this run.
          model: An NNX module.
          optimizer: Its NNX optimizer.
          metrics: What `monitor` may rank by, such as "val/loss".
        """
        self._state = _state_of(model, optimizer)
        if step <= self._step_of_run:  # another run, which counts from 1 again
            self._steps_before = self._loop.trainer.global_step
        self._loop.step(self._steps_before + step, metrics)
        self._step_of_run = step


def _state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """Model and optimizer, each once: an optimizer that holds its model would bring it again."""
    return {
        "params": model,
        "opt_state": {"step": optimizer.step, "opt_state": optimizer.opt_state},
    }
