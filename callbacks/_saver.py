"""Saves the steps of one callback: what is streamed, then the rest of the state.

If training fails, the last finished step can be saved, too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import flax_partial as fp
from flax_partial.callbacks import _state
from flax_partial.callbacks._finished import Finished
from flax_partial.callbacks._leaves import flatten
from flax_partial.callbacks._restored import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flax_partial.callbacks._claims import Claims
    from flax_partial.callbacks._groups import Grouping
    from flax_partial.callbacks._leaves import Leaves
    from flax_partial.callbacks._member import Member
    from flax_partial.callbacks._run import Run
    from flax_partial.callbacks._stateful import Extras
    from flax_partial.subtrees import Name

logger = logging.getLogger(__name__)


class StepSaver:
    """Saves steps of a trainer into the checkpoints of a run.

    Attributes:
      epoch_began: Steps done when the epoch under way began.
    """

    def __init__(
        self,
        run: Run,
        member: Member,
        grouping: Grouping,
        extras: Extras,
        state_fn: _state.StateFn | None,
    ) -> None:
        self.epoch_began = 0
        self._run = run
        self._member = member
        self._grouping = grouping
        self._extras = extras
        self._state_fn = state_fn
        self._finished: Finished | None = None

    def is_due(self, trainer: Any, step: int, *, epoch_ends: bool) -> bool:
        """Whether `step` is to be saved: cheap enough to ask at every layer."""
        return self._run.members.is_due(
            self._member, step, trainer.current_epoch, epoch_ends=epoch_ends
        )

    def stream(self, trainer: Any, step: int, root: str, name: Name, tree: Any) -> None:
        """Saves one layer of `step`, below `root`."""
        checkpoint = self._run.open(self._member, step=step, epoch=trainer.current_epoch)
        try:
            groups = self._grouping.streamed(root, name, _state.pure(tree))
        except Exception as error:  # noqa: BLE001 - a tree that JAX cannot flatten
            checkpoint.fail(error, [self._member])
        else:
            checkpoint.save(self._member, groups)

    def save(self, trainer: Any, module: Any, *, epoch_ends: bool) -> None:
        """Saves what was not streamed of the step that has just ended."""

        def take(claims: Claims) -> Any:
            return self._take(trainer, module, claims)

        closing = self._closing(trainer, epoch_ends=epoch_ends)
        step, epoch = trainer.global_step, trainer.current_epoch
        self._save(take, step, epoch, closing, epoch_ends=epoch_ends)

    def check(self, trainer: Any, module: Any, step: int) -> None:
        """Finds what would fail when the first checkpoint is due, and raises or logs it.

        Raises:
          CheckpointExistsError: The directory holds this step, or a later one.
          UnsupportedLeafError: No checkpoint can hold some leaf of the state.
          Exception: What `state_fn` raises; or the directory cannot be made.
        """
        try:
            self._run.check_is_newer(step)
            is_due = self.is_due(trainer, step, epoch_ends=trainer.is_last_batch)
            tree = None if is_due else _state.take(trainer, module, self._state_fn)
            if tree is not None and flatten(tree):  # else it may be streamed, all of it
                fp.check(tree)
        except Exception as error:
            if self._member.failures.are_raised:
                error.add_note("No checkpoint is due yet; the first one would have failed so.")
                raise
            logger.exception("The first checkpoint of %s will fail.", self._run.directory)

    def remember(self, trainer: Any, module: Any) -> None:
        """Keeps the step that has just ended, for `rescue`."""
        closing = self._closing(trainer, epoch_ends=trainer.is_last_batch)
        self._finished = Finished.of(trainer, module, self._state_fn, closing)
        self._member.has_finished_step = True

    def forget(self) -> None:
        """Drops what `remember` keeps."""
        self._finished = None

    def rescue(self) -> None:
        """Saves the step that was remembered, and finalizes what is complete; training failed."""
        finished = self._finished
        try:
            if finished is not None and finished.step not in (0, self._member.last_saved):
                finished.check_is_there()
                logger.warning("Training failed: step %d is saved before it ends.", finished.step)
                self._run.members.rescued_step = finished.step
                self._save(
                    lambda _: finished.tree,
                    finished.step,
                    finished.epoch,
                    finished.closing,
                    epoch_ends=False,
                )
            self._run.open_checkpoints.finish_closed()
        except Exception:
            logger.exception("The last finished step could not be saved.")

    def _save(
        self,
        take: Callable[[Claims], Any],
        step: int,
        epoch: int,
        closing: Mapping[str, Any],
        *,
        epoch_ends: bool,
    ) -> None:
        member = self._member
        checkpoint = self._run.open(member, step=step, epoch=epoch)
        groups: dict[str, Leaves] = {}
        try:
            groups = self._grouping.rest(take(checkpoint.claims), checkpoint.claims)
        except Exception as error:  # noqa: BLE001 - of state_fn, group_by, or a tree they cannot take
            checkpoint.fail(error, [member])
        self._run.close(
            member, checkpoint, groups, epoch=epoch, epoch_ends=epoch_ends, closing=closing
        )

    def _take(self, trainer: Any, module: Any, claims: Claims) -> Any:
        tree = _state.take(trainer, module, self._state_fn)
        if tree is None and self._state_fn is None and not claims.names:
            raise TypeError(
                f"Found no state to save in {type(trainer).__name__}: its module is no NNX module, "
                "and its `state` no tree. Pass state_fn=, or stream every layer."
            )
        return tree

    def _closing(self, trainer: Any, *, epoch_ends: bool) -> Mapping[str, Any]:
        """Returns what is saved of training after a step, beside the arrays."""
        step, epoch = trainer.global_step, trainer.current_epoch
        steps_of_epoch = 0 if epoch_ends else step - self.epoch_began
        progress = Progress(step, epoch + epoch_ends, steps_of_epoch)
        return {**progress.metadata, **self._extras.metadata()}
