"""Saves the steps of one callback: what is streamed, then the rest of the state.

If training fails, the last finished step can be saved, too.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import flax_partial as fp
from flax_partial.callbacks import _state
from flax_partial.callbacks._groups import joined_name
from flax_partial.callbacks._leaves import flatten
from flax_partial.callbacks._restored import Closing, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from flax_partial.callbacks._checkpoint import Checkpoint
    from flax_partial.callbacks._claims import Claims
    from flax_partial.callbacks._groups import Grouping
    from flax_partial.callbacks._leaves import Leaves
    from flax_partial.callbacks._member import Member
    from flax_partial.callbacks._run import Run
    from flax_partial.callbacks._stateful import Extras
    from flax_partial.subtrees import Name

logger = logging.getLogger(__name__)

# What a trainer streams to, by the root of the tree that it stands below.
_CALLS = {"params": "on_layer_ready", "opt_state": "on_optimizer_state_ready"}


@dataclass(frozen=True)
class _Finished:
    """A finished step.

    JAX's arrays never change, so keeping references to them costs no copy. Once the next step has
    failed, those that were donated to it are gone.

    Attributes:
      step: The step.
      epoch: Its epoch, the first being 0.
      closing: What else is saved then.
      tree: The state right after it; NumPy's arrays, which may change, are copies.
    """

    step: int
    epoch: int
    closing: Closing
    tree: Any

    def check_is_there(self) -> None:
        """Checks that all arrays can still be read.

        Raises:
          ValueError: Some were donated.
        """
        leaves = jax.tree.leaves(self.tree)
        gone = sum(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)
        if gone:
            raise ValueError(
                f"{gone} of {len(leaves)} arrays of step {self.step} were donated to the step that "
                "failed. Without donation, or where it fails between two steps, it can be saved."
            )


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
        *,
        state_fn: _state.StateFn | None,
        custom_metadata: Mapping[str, Any],
    ) -> None:
        self.epoch_began = 0
        self._run = run
        self._member = member
        self._grouping = grouping
        self._extras = extras
        self._state_fn = state_fn
        self._custom_metadata = custom_metadata
        self._streamed: set[str] = set()  # layers of the first step, if that is not saved
        self._finished: _Finished | None = None
        self._closed = 0, Closing({}, {})  # epoch and closing of the step that was saved last

    def find(self, trainer: Any, module: Any) -> Any:
        """Returns what it saves of a trainer, with NNX objects in it.

        Raises:
          TypeError: There is nothing.
        """
        found = _state.find(trainer, module, self._state_fn)
        if found is None and self._state_fn is None:
            raise TypeError(
                f"Found no state to save in {type(trainer).__name__}: its module is no NNX module, "
                "and its `state` no tree. Pass state_fn=, or stream every layer."
            )
        return found

    def is_due(self, trainer: Any, step: int, *, epoch_ends: bool) -> bool:
        """Whether `step` is to be saved: cheap enough to check at every layer."""
        return self._run.members.is_due(
            self._member, step, trainer.current_epoch, epoch_ends=epoch_ends
        )

    def note_streamed(self, root: str, name: Name) -> None:
        """Notes, for `check`, a layer that is streamed in a step that is not saved."""
        self._streamed.add(joined_name(root, name))

    def stream(self, trainer: Any, step: int, root: str, name: Name, tree: Any) -> None:
        """Saves one layer of `step`, below `root`."""
        checkpoint = self._run.open(self._member, step=step, epoch=trainer.current_epoch)
        try:
            groups = self._grouping.streamed(root, name, _state.pure(tree))
            self._check_is_first(checkpoint, root, [one for of in groups.values() for one in of])
        except Exception as error:  # noqa: BLE001 - such as a tree that JAX cannot flatten
            checkpoint.fail(error, [self._member])
        else:
            checkpoint.save(self._member, groups)

    def save(self, trainer: Any, module: Any, *, epoch_ends: bool) -> None:
        """Saves what was not streamed of the step that has just ended."""
        take = functools.partial(self._take, trainer, module)
        closing = self._closing(trainer, epoch_ends=epoch_ends)
        step, epoch = trainer.global_step, trainer.current_epoch
        self._save(take, step, epoch, closing, epoch_ends=epoch_ends)

    def check(self, trainer: Any, module: Any, step: int) -> None:
        """Finds what would fail when the first checkpoint is due, and raises or logs it.

        Raises:
          CheckpointExistsError: The directory holds this step, or a later one.
          UnsupportedLeafError: No checkpoint can hold some leaf of the state.
          ValueError: `stacked` names no leaf of it.
          Exception: What `state_fn` or `group_by` raises; or the directory cannot be made.
        """
        with self._told_early():
            if not self._grouping.has_streamed and _state.lacks_optimizer(
                _state.find(trainer, module, self._state_fn)
            ):
                logger.warning(
                    "The state that is saved into %s is an NNX model without its optimizer: "
                    "training that goes on from it begins with a new one. Save both, such as "
                    '{"params": model, "opt_state": optimizer}.',
                    self._run.directory,
                )
            self._run.check_is_newer(step)
            is_due = self.is_due(trainer, step, epoch_ends=trainer.is_last_batch)
            tree = None if is_due else _state.take(trainer, module, self._state_fn)
            if tree is not None and flatten(tree):  # else it may be streamed, all of it
                fp.check(tree)
                self._grouping.check(tree, self._streamed)

    @contextlib.contextmanager
    def _told_early(self) -> Iterator[None]:
        """Raises or logs what would fail when the first checkpoint is due."""
        try:
            yield
        except Exception as error:
            if self._member.failures.are_raised:
                error.add_note("No checkpoint is due yet; the first one would fail with this.")
                raise
            logger.exception("The first checkpoint of %s will fail.", self._run.directory)

    def remember(self, trainer: Any, module: Any) -> None:
        """Keeps the step that has just ended, for `rescue`."""
        closing = self._closing(trainer, epoch_ends=trainer.is_last_batch)
        tree = jax.tree.map(_copied, _state.take(trainer, module, self._state_fn))
        self._finished = _Finished(trainer.global_step, trainer.current_epoch, closing, tree)
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
                self._save_finished(finished)
            self._run.open_checkpoints.finish_closed()
        except Exception:
            logger.exception("The last finished step could not be saved.")

    def save_again(self, trainer: Any, module: Any) -> None:
        """Saves the step that was saved last a second time, without copies on devices.

        Where the trainer no longer has its state, that is logged.
        """
        member = self._member
        options, member.options = member.options, replace(member.options, max_device_bytes=0)
        try:
            tree = _state.take(trainer, module, self._state_fn)
            self._grouping.check_holds_streamed(tree)
            finished = _Finished(trainer.global_step, *self._closed, tree)
            finished.check_is_there()
            member.failures.logged = None
            self._save_finished(finished)
        except Exception:
            logger.exception("Step %d could not be saved a second time.", trainer.global_step)
        finally:
            member.options = options

    def _save_finished(self, finished: _Finished) -> None:
        step, epoch, closing = finished.step, finished.epoch, finished.closing
        self._save(lambda _: finished.tree, step, epoch, closing, epoch_ends=False)

    def _save(
        self,
        take: Callable[[Claims], Any],
        step: int,
        epoch: int,
        closing: Closing,
        *,
        epoch_ends: bool,
    ) -> None:
        member = self._member
        self._closed = epoch, closing
        checkpoint = self._run.open(member, step=step, epoch=epoch)
        groups: dict[str, Leaves] = {}
        try:
            groups = self._grouping.rest(take(checkpoint.claims), checkpoint.claims)
        except Exception as error:  # noqa: BLE001 - of state_fn, group_by, or a tree they cannot take
            checkpoint.fail(error, [member])
        self._run.close(
            member, checkpoint, groups, epoch=epoch, epoch_ends=epoch_ends, closing=closing
        )

    def _check_is_first(self, checkpoint: Checkpoint, root: str, leaves: Leaves) -> None:
        twice = checkpoint.claims.already(self._member.key, leaves)
        if twice is not None:
            raise fp.KeyConflictError(
                f"Leaf {twice!r} was handed to {_CALLS[root]} twice in step {checkpoint.step}. "
                "Each layer is handed over once a step."
            )

    def _take(self, trainer: Any, module: Any, claims: Claims) -> Any:
        if claims.names:
            return _state.take(trainer, module, self._state_fn)
        return _state.pure(self.find(trainer, module))

    def _closing(self, trainer: Any, *, epoch_ends: bool) -> Closing:
        """Returns what is saved after a step, beside the arrays."""
        step, epoch = trainer.global_step, trainer.current_epoch
        steps_of_epoch = 0 if epoch_ends else step - self.epoch_began
        progress = Progress(step, epoch + epoch_ends, steps_of_epoch)
        of_step = getattr(trainer, "custom_metadata", {})
        return Closing(
            training={**progress.metadata, **self._extras.metadata()},
            custom_metadata={**self._custom_metadata, **of_step},
        )


def _copied(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
