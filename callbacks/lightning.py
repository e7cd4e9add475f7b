"""Lightning 2: a callback beside `ModelCheckpoint`, for modules that train a JAX model.

Such a module sets `automatic_optimization = False`, and has its JAX state in an attribute `state`:
a dict, as `{"params": ..., "opt_state": ...}`, in which NNX objects may stand. Lightning's own
counters are saved with it, so that `fit` goes on in the epoch and at the batch it stopped at.

Under manual optimization Lightning counts the steps of PyTorch's optimizers. A module that has
none would stay at step 0 for ever: neither `max_steps` nor any checkpoint callback would ever see
it move. So its batches are counted as steps here, in Lightning's own counter.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from flax_partial.callbacks import _extras
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

_extras.need("lightning", extra="lightning")

from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    import os

logger = logging.getLogger(__name__)

_PROGRESS = "lightning"


class LightningCheckpoint(PartialCheckpointCallback, Callback):
    """Checkpoints `module.state` in a `lightning.Trainer`, and goes on from the newest one.

    All hooks and calls are those of `PartialCheckpointCallback`, `on_layer_ready` for modules that
    stream included. PyTorch parameters of the module are none of its business: those are for
    `ModelCheckpoint`.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, resume: bool = True, **options: Any
    ) -> None:
        """Prepares a callback; nothing is written before training begins.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          resume: Whether `fit` goes on from the newest checkpoint. One that is given a `ckpt_path`,
            or goes on with a trainer that has trained already, never does.
          options: What else `PartialCheckpointCallback` takes, but for `state_fn`.

        Raises:
          TypeError: There is no such option.
          ValueError: An option has a value that makes no sense, alone or with another.
        """
        super().__init__(directory, state_fn=_take, **options)
        self._resumes = resume

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Recovers what an ended run has left, and restores the newest checkpoint.

        Raises:
          TypeError: The module has no `state`, or none that is a dict.
          TargetMismatchError: The checkpoint does not fit it; nothing was updated.
        """
        state = _state_of(module)
        super().on_fit_start(trainer, module)
        if self._resumes and trainer.global_step == 0 and trainer.ckpt_path is None:
            self._resume(trainer, module, state)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step if it is to be saved; counts it first where Lightning does not."""
        if trainer.global_step == self._step_before and not _has_torch_optimizer(trainer):
            progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Finalizes; says so where an epoch has gone by without any step that counts."""
        if trainer.global_step == 0:
            logger.warning(
                "Lightning has counted no step in epoch %d, so nothing is saved: %s has optimizers "
                "of PyTorch's, whose steps are what counts, and calls none of them.",
                trainer.current_epoch,
                type(module).__name__,
            )
        super().on_train_epoch_end(trainer, module)

    def _resume(self, trainer: Any, module: Any, state: dict[str, Any]) -> None:
        restored = self.restore({**state, _PROGRESS: ""})
        if restored is not None:
            module.state = restored[0]
            trainer.fit_loop.load_state_dict(json.loads(module.state.pop(_PROGRESS)))


def _state_of(module: Any) -> dict[str, Any]:
    state = getattr(module, "state", None)
    if not isinstance(state, dict):
        raise TypeError(
            f"{type(module).__name__}.state is {type(state).__name__}; it must be a dict of "
            'what is saved, such as {"params": ..., "opt_state": ...}, from before fit starts.'
        )
    return state


def _take(trainer: Any, module: Any) -> dict[str, Any]:
    return {**_state_of(module), _PROGRESS: json.dumps(trainer.fit_loop.state_dict())}


def _has_torch_optimizer(trainer: Any) -> bool:
    """Whether PyTorch has anything to step: Lightning's stand-in for none has no parameters."""
    return trainer.lightning_module.automatic_optimization or any(
        optimizer.param_groups for optimizer in trainer.optimizers
    )
