"""Lightning 2: a callback beside `ModelCheckpoint`, for modules that train a JAX model.

Such a module sets `automatic_optimization = False`, and has its JAX state in an attribute `state`:
a dict, as `{"params": ..., "opt_state": ...}`, in which NNX objects may stand. Lightning's own
counters are saved with it, so that `fit` goes on in the epoch and at the batch it stopped at. Where
PyTorch trains something beside it, that is saved as well, in one leaf: both go on at one step.

Under manual optimization Lightning counts the steps of PyTorch's optimizers. A module that has
none would stay at step 0 for ever: neither `max_steps` nor any checkpoint callback would ever see
it move. So its batches are counted as steps here, in Lightning's own counter.
"""

from __future__ import annotations

import io
import json
import logging
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

import flax_partial as fp
from flax_partial.callbacks import _extras
from flax_partial.callbacks._hooks import in_training
from flax_partial.callbacks._options import LoopOptions, explicit
from flax_partial.callbacks._state import LoadOptions, RestoreOptions
from flax_partial.callbacks.loop import resume_options, resuming
from flax_partial.callbacks.partial_checkpoint import PartialCheckpointCallback

_extras.need("lightning", extra="lightning")

import torch
from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    import os

    from flax_partial.runs.directory import AnyPath

logger = logging.getLogger(__name__)

_PROGRESS = "lightning"
_TORCH = "torch"


class LightningCheckpoint(PartialCheckpointCallback, Callback):
    """Checkpoints `module.state` in a `lightning.Trainer`, and goes on from the newest one.

    All hooks and calls are those of `PartialCheckpointCallback`, `on_layer_ready` for modules that
    stream included. With a `ckpt_path` Lightning restores what PyTorch trains, and this callback
    the checkpoint of the same step.
    """

    @explicit(LoopOptions, PartialCheckpointCallback.__init__)
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
          resume: Whether `fit` restores `module.state`: from the newest checkpoint; given a
            `ckpt_path`, from that of its step. With a trainer that has trained already it goes on
            as it is. Or from which, and how: a dict of what `PartialCheckpointCallback.restore`
            takes beside the target, such as `{"which": 60, "discard_later": True}`. A script that
            says `which` goes back at each start.
          options: What else `PartialCheckpointCallback` takes, but for `state_fn`.

        Raises:
          TypeError: There is no such option, or none such of `resume`.
          ValueError: An option has a value that makes no sense, alone or with another.
        """
        super().__init__(directory, state_fn=_take, **options)
        self._resume = resume_options(resume)
        self._step_of_lightning: int | None = None

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Remembers the step that Lightning goes on from."""
        self._step_of_lightning = checkpoint.get("global_step")

    @in_training
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Recovers what an ended run has left, and restores the newest checkpoint.

        Raises:
          TypeError: The module has no `state`, or none that is a dict.
          TargetMismatchError: The checkpoint does not fit it; nothing was updated.
          NoSessionError: There is no checkpoint of the step that Lightning goes on from.
          CheckpointExistsError: It is older than the newest.
        """
        _state_of(module)
        super().on_fit_start(trainer, module)
        if self._resume is None:
            return
        if trainer.ckpt_path is not None:
            self._follow(trainer, module, self._resume)
        elif trainer.global_step == 0 or "which" in self._resume:
            self._go_on(trainer, module, self._resume)

    def on_sanity_check_end(self, trainer: Any, module: Any) -> None:
        """Remembers which metrics a validation sets."""
        self.expected_metrics = tuple(trainer.callback_metrics)

    @in_training
    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves the step if it is to be saved; counts it first where Lightning does not."""
        if trainer.global_step == self._step_before and not _has_torch_optimizer(trainer):
            progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    @in_training
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Finalizes; warns where an epoch has gone by without any step that counts."""
        if trainer.global_step == 0:
            logger.warning(
                "Lightning has counted no step in epoch %d, so nothing is saved: %s has optimizers "
                "of PyTorch's, whose steps are what counts, and calls none of them.",
                trainer.current_epoch,
                type(module).__name__,
            )
        super().on_train_epoch_end(trainer, module)

    def _go_on(self, trainer: Any, module: Any, options: RestoreOptions) -> None:
        """Restores what JAX trains and what PyTorch does, with Lightning's counters."""
        with resuming():
            restored = self.restore(_take(trainer, module), **options)
        if restored is not None:
            module.state, progress, torch_state = _split(restored[0])
            trainer.fit_loop.load_state_dict(json.loads(progress))
            if torch_state is not None:
                _set_torch(trainer, torch_state)
            self._resume = RestoreOptions()  # to go back once is enough

    def _follow(self, trainer: Any, module: Any, options: RestoreOptions) -> None:
        """Restores what JAX trains from the checkpoint of the step that Lightning goes on from."""
        step = self._step_of_lightning
        if step == 0:
            return
        way_out = (
            "Give fit a ckpt_path of a step that is there, or none, to go on from the newest; or "
            "resume=False, if the module restores its state itself."
        )
        if step is None or options.get("which", step) != step:
            raise ValueError(
                f"Lightning goes on from step {step} of {trainer.ckpt_path}, and "
                f"{type(self).__name__} is given resume={options!r}. {way_out}"
            )
        of_that_step: RestoreOptions = {**options, "which": step}
        try:
            with resuming():
                restored = self.restore(_take(trainer, module), **of_that_step)
        except fp.NoSessionError as error:
            error.add_note(f"Lightning goes on from step {step}, of {trainer.ckpt_path}. {way_out}")
            raise
        if restored is not None:
            module.state, _, _ = _split(restored[0])

    def _load(self, path: AnyPath, target: Any, options: LoadOptions) -> Any:
        stored = fp.metadata(path).leaves.get(_TORCH)
        if isinstance(target, dict) and _TORCH in target and stored is not None:
            target = {**target, _TORCH: np.empty(stored.shape, np.uint8)}  # it may have grown
        return super()._load(path, target, options)


def _state_of(module: Any) -> dict[str, Any]:
    state = getattr(module, "state", None)
    if not isinstance(state, dict):
        raise TypeError(
            f"{type(module).__name__}.state is {type(state).__name__}; it must be a dict of "
            'what is saved, such as {"params": ..., "opt_state": ...}, from before fit starts.'
        )
    return state


def _take(trainer: Any, module: Any) -> dict[str, Any]:
    tree = {**_state_of(module), _PROGRESS: json.dumps(_progress(trainer))}
    return tree | ({_TORCH: _torch_state(trainer)} if _has_torch_optimizer(trainer) else {})


def _progress(trainer: Any) -> dict[str, Any]:
    """Returns Lightning's counters.

    Where it goes on after an epoch that its counters hold as under way, it does not count the next
    one as begun, and would take that for ended the next time.
    """
    counters: dict[str, Any] = trainer.fit_loop.state_dict()
    batches = counters["epoch_loop.batch_progress"]["current"]
    is_in_epoch = batches["completed"] < batches["ready"]
    for epochs in counters["epoch_progress"].values():  # of this run, and in all
        begun = max(epochs["processed"], epochs["completed"] + is_in_epoch)
        epochs.update(ready=max(epochs["ready"], begun), started=max(epochs["started"], begun))
    return counters


def _split(tree: dict[str, Any]) -> tuple[dict[str, Any], str, np.ndarray | None]:
    """Returns the module's state, Lightning's counters, and what PyTorch trains, if it does."""
    state = {root: leaves for root, leaves in tree.items() if root not in (_PROGRESS, _TORCH)}
    return state, tree[_PROGRESS], tree.get(_TORCH)


def _torch_state(trainer: Any) -> np.ndarray:
    """Returns what PyTorch trains, as the bytes of its own format."""
    strategy = trainer.strategy
    state = {
        "state_dict": strategy.lightning_module_state_dict(),
        "optimizer_states": [strategy.optimizer_state(one) for one in trainer.optimizers],
        "lr_schedulers": [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return np.frombuffer(buffer.getbuffer(), np.uint8)


def _set_torch(trainer: Any, stored: np.ndarray) -> None:
    state = torch.load(io.BytesIO(stored.tobytes()), map_location="cpu", weights_only=True)
    strict = trainer.lightning_module.strict_loading
    trainer.strategy.load_model_state_dict(state, strict=strict)
    trainer.strategy.load_optimizer_state_dict(state)
    for config, of_one in zip(trainer.lr_scheduler_configs, state["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(of_one)


def _has_torch_optimizer(trainer: Any) -> bool:
    """Whether PyTorch has anything to step: Lightning's stand-in for none has no parameters."""
    return trainer.lightning_module.automatic_optimization or any(
        optimizer.param_groups for optimizer in trainer.optimizers
    )
