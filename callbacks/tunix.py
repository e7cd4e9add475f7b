"""tunix: `TrainingHooks` for its `PeftTrainer`.

tunix reports a step's end one step late, and the first one's not at all: its loss is fetched while
the next step runs. So steps are read from `train_steps`, at each hook between two steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from flax_partial.callbacks import _extras
from flax_partial.callbacks._options import LoopOptions, explicit
from flax_partial.callbacks._state import RestoreOptions
from flax_partial.callbacks.loop import Loop, LoopCheckpoint, resume_options, resuming
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

_extras.need("tunix", extra="tunix")

from tunix.sft.hooks import TrainingHooks

if TYPE_CHECKING:
    import os

_METRICS = frozenset({"loss", "eval_loss"})


class TunixCheckpoint(LoopCheckpoint, TrainingHooks):
    """Checkpoints the model that a `PeftTrainer` trains, and goes on from the newest checkpoint.

    The last step is saved as well, as the end of an epoch, unless `every_n_epochs=None`. tunix
    reports a step's loss during the next one: a checkpoint has its own "loss" only where `monitor`
    makes it wait for that, and its "eval_loss" where an evaluation followed its step.

    tunix calls no hook where `train` raises: put `with hooks:` around it.
    """

    @explicit(LoopOptions, PartialCheckpointCallback.__init__)
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        resume: bool | RestoreOptions = True,
        **options: Unpack[LoopOptions],
    ) -> None:
        """Prepares hooks; nothing is written before training begins.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          resume: Whether `train` goes on from the newest checkpoint. A trainer that has trained
            already, or that tunix has restored, goes on by itself. Or from which, and how: a dict
            of what `PartialCheckpointCallback.restore` takes beside the target, such as
            `{"which": 60, "discard_later": True}`. A script that says `which` goes back at each
            start.
          options: What else `PartialCheckpointCallback` takes, but for `state_fn`.

        Raises:
          TypeError: There is no such option, or none such of `resume`.
          ValueError: An option has a value that makes no sense, alone or with another.
        """
        self._loop = Loop(directory, lambda: self._state, options)
        unknown = self.callback.monitors - _METRICS
        if unknown:
            raise ValueError(
                f"monitor={min(unknown)!r}: the metrics that tunix reports are "
                f"{' and '.join(map(repr, sorted(_METRICS)))}."
            )
        self._resume = resume_options(resume)
        self._state: Any = None

    def on_train_start(self, train_ctx: Any) -> None:
        """Recovers what an ended run has left, and restores the newest checkpoint.

        tunix then skips the examples that were trained on, as it does for its own checkpoints.

        Raises:
          TargetMismatchError: The checkpoint does not fit the model; nothing was updated.
          CheckpointExistsError: It is older than the newest.
        """
        self._state = {"params": train_ctx.model, "opt_state": train_ctx.optimizer}
        self._loop.start(train_ctx.train_steps)
        if self._resume is None or train_ctx.train_steps > 0:
            self._loop.begin()
            return
        with resuming():
            restored = self._loop.restore(self._state, **self._resume)
        if restored is not None:
            self._resume = RestoreOptions()  # to go back once is enough
            steps = self._loop.trainer.global_step
            rounds = train_ctx.config.gradient_accumulation_steps or 1
            train_ctx._train_steps = steps  # noqa: SLF001 - tunix has no other way
            train_ctx._iter_steps = steps * rounds  # noqa: SLF001

    def on_train_step_start(self, train_ctx: Any) -> None:
        """Saves the step before, if it is to be saved and was not."""
        self._report(train_ctx)

    def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None:
        """Saves the step that has just ended; the loss is of the one before."""
        if train_step == self._loop.trainer.global_step:
            self._loop.add_metrics({"loss": train_loss})
        self._report(train_ctx)

    def on_train_end(self, train_ctx: Any) -> None:
        """Saves the last step, and waits until every checkpoint is finalized."""
        self._report(train_ctx)
        self._loop.close(None)

    def on_eval_step_start(self, train_ctx: Any) -> None:
        """Saves the step that is evaluated, if it is to be saved and was not."""
        self._report(train_ctx)

    def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None:
        """Scores the step that was evaluated."""
        self._loop.add_metrics({"eval_loss": eval_loss})

    def _report(self, train_ctx: Any) -> None:
        if self._loop.is_running and train_ctx.train_steps > self._loop.trainer.global_step:
            self._loop.step(train_ctx.train_steps, None)
