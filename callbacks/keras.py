"""Keras 3 on its JAX backend: a `keras.callbacks.Callback` for `model.fit`.

What is saved is Keras's own tree of a model, `model.get_state_tree()`: trainable, non-trainable
(seeds of dropout are among these), optimizer and metric variables, each by its path.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Unpack

import flax_partial as fp
from flax_partial.callbacks import _extras
from flax_partial.callbacks._keras_epochs import FitEpochs, epochs_of
from flax_partial.callbacks._options import LoopOptions, explicit
from flax_partial.callbacks._state import RestoreOptions
from flax_partial.callbacks.loop import Loop, LoopCheckpoint, resume_options, resuming
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

_extras.need("keras", extra="keras")

import keras

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


_METRICS = "metrics_variables"  # sums that Keras starts anew with each epoch
_EPOCHS = "epochs_done"


class KerasCheckpoint(LoopCheckpoint, keras.callbacks.Callback):
    """Checkpoints the model that `fit` trains, and goes on from the newest checkpoint.

    Keras goes on at the beginning of an epoch, never within one: where the newest checkpoint was
    made in mid-epoch, that epoch is trained anew, on weights that have seen some of it already. So
    results are those of a run that was never stopped if checkpoints are made at epochs' ends.

    Keras calls no callback where `fit` raises: put `with checkpoints:` around it. Without that, the
    next `fit` in the same directory ends the one that failed. The next `fit` of that model goes on
    where it would in a new process: from the newest checkpoint.
    """

    @explicit(LoopOptions, PartialCheckpointCallback.__init__, mode="auto")
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        resume: bool | RestoreOptions = True,
        **options: Unpack[LoopOptions],
    ) -> None:
        """Prepares a callback; nothing is written before training begins.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          resume: Whether `fit` goes on from the newest checkpoint, where it has a later step than
            the model, or the model's last `fit` has failed. Or from which, and how: a dict of what
            `PartialCheckpointCallback.restore` takes beside the target, such as
            `{"which": 60, "discard_later": True}`; with `which`, whatever the model's step is. A
            script that says `which` goes back at each start.
          options: What else `PartialCheckpointCallback` takes, but for `state_fn`; `mode` is "auto"
            by default, as it is in Keras.

        Raises:
          RuntimeError: Keras runs on another backend than JAX.
          TypeError: There is no such option, or none such of `resume`.
          ValueError: An option has a value that makes no sense, alone or with another.
        """
        super().__init__()
        if keras.backend.backend() != "jax":
            raise RuntimeError(
                f"Keras runs on {keras.backend.backend()!r}, and KerasCheckpoint saves arrays of "
                "JAX. Set the environment variable KERAS_BACKEND=jax before keras is imported."
            )
        self._loop = Loop(directory, self._state, options)
        self._resume = resume_options(resume)
        self._step_of_epoch = 0
        self._epochs = FitEpochs()

    def on_train_begin(self, logs: Any = None) -> None:
        """Recovers what an ended run has left, and restores the newest checkpoint.

        Raises:
          TargetMismatchError: The checkpoint does not fit the model; nothing was updated.
          CheckpointExistsError: It is older than the newest.
        """
        step = int(self.model.optimizer.iterations)
        self._epochs = epochs_of(self.model)
        self._loop.start(step)
        if self._resume is None:
            self._loop.begin()
            return
        newest = max(fp.steps(self.callback.directory), default=0)
        has_failed, self._epochs.is_in_fit = self._epochs.is_in_fit, False
        if newest > step or "which" in self._resume or (has_failed and newest > 0):
            self._go_on(self._resume)
        else:
            self._loop.begin()
        step = self._loop.trainer.global_step
        self._set_initial_epoch(self._epochs.begin_fit(step, self.params["epochs"]))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Remembers the step before the epoch."""
        self._set_initial_epoch(None)  # which would be that of the next `fit`, too
        self._loop.trainer.current_epoch = self._epochs.begin_epoch(epoch)
        self._step_of_epoch = self._loop.trainer.global_step

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Finalizes what has waited for its score."""
        self._loop.begin_step()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves the step if it is to be saved."""
        steps = self.params.get("steps")
        # Of several in one execution, Keras names the last there could have been.
        done = batch + 1 if steps is None else min(batch + 1, steps)
        if not self.callback.expected_metrics and _has_own_steps(self.model):
            self.callback.expected_metrics = [f"val_{name}" for name in logs or ()]
        self._loop.step(self._step_of_epoch + done, logs, is_last_batch=done == steps)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves if that is due, and finalizes with the metrics of the epoch, validation's too."""
        self._loop.end_epoch(epoch + self._epochs.offset, logs)
        self._epochs.done = self._loop.trainer.current_epoch

    def on_train_end(self, logs: Any = None) -> None:
        """Waits until every checkpoint is finalized."""
        self._set_initial_epoch(None)
        self._epochs.is_in_fit = False
        self._loop.close(None)

    def _state(self) -> dict[str, Any]:
        # Asking for `model` makes Keras gather its variables, which is for saved steps only.
        tree = self.model.get_state_tree()
        trainer = self._loop.trainer
        epochs_done = trainer.current_epoch + trainer.is_last_batch - self._epochs.offset
        return {root: tree[root] for root in tree if root != _METRICS} | {_EPOCHS: epochs_done}

    def _go_on(self, options: RestoreOptions) -> None:
        with resuming(), _hinted():
            tree = self._loop.restore(self._state(), **options)
        if tree is not None:
            step, done = self._loop.trainer.global_step, self._loop.trainer.current_epoch
            self._epochs.restore(step, done=done, of_fit=tree.pop(_EPOCHS))
            self.model.set_state_tree(tree)
            self._resume = RestoreOptions()  # to go back once is enough

    def _set_initial_epoch(self, epoch: int | None) -> None:
        self.model._initial_epoch = epoch  # noqa: SLF001 - as Keras's own BackupAndRestore does


def _has_own_steps(model: keras.Model) -> bool:
    """Whether Keras's own steps compute its metrics: then a validation has those of training."""
    kind = type(model)
    return kind.train_step is keras.Model.train_step and kind.test_step is keras.Model.test_step


@contextlib.contextmanager
def _hinted() -> Iterator[None]:
    """Adds to an error what Keras does to the names of a model that is built again."""
    try:
        yield
    except fp.TargetMismatchError as error:
        raise fp.TargetMismatchError(
            f"{error}\nKeras numbers names on (adam_1) if a model is built again in one process: "
            "call keras.utils.clear_session() before it is built, or name layers and optimizers."
        ) from error
