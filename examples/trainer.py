"""A small trainer with Lightning's hooks: copy it and grow your own from it.

A callback is any object; of the hooks below it has those it needs, with Lightning's signatures:

    setup(trainer, module, stage)                 teardown(trainer, module, stage)
    on_fit_start(trainer, module)                 on_fit_end(trainer, module)
    on_train_start(trainer, module)               on_train_end(trainer, module)
    on_train_epoch_start(trainer, module)         on_train_epoch_end(trainer, module)
    on_train_batch_start(trainer, module, batch, batch_idx)
    on_train_batch_end(trainer, module, outputs, batch, batch_idx)
    on_exception(trainer, module, exception)

and two that Lightning has not, for callbacks that save state piece by piece:

    on_layer_ready(trainer, name, tree)           on_optimizer_state_ready(trainer, name, tree)

A module that can say when a layer's new parameters or optimizer state have been computed, or will
be without further calls from here, hands them to `Trainer.layer_ready` and
`Trainer.optimizer_state_ready` from within its training step, and does so in every step: a callback
that does not save this step returns at once. A module that hands over nothing is saved from
`Trainer.state` at the end of the step.

One invariant carries resuming: between two training steps `Trainer.state` is everything that the
rest of the training depends on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import jax

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Tree = Any
_COUNTERS = ("global_step", "current_epoch", "batches_done")


class Module(Protocol):
    """What the trainer trains."""

    @property
    def batches_per_epoch(self) -> int:
        """How many batches `batches` yields for a whole epoch."""

    def state(self) -> dict[str, Tree]:
        """Everything the module's next steps depend on, as a tree of arrays where they are now."""

    def load_state(self, state: Mapping[str, Tree]) -> None:
        """Replaces the state by what `state` returned in another run."""

    def batches(self, epoch: int, start: int) -> Iterable[Any]:
        """The batches of an epoch from number `start` on: the same ones in every run."""

    def training_step(self, trainer: Trainer, batch: Any, batch_idx: int) -> dict[str, jax.Array]:
        """Trains on one batch and returns its metrics; need not wait for the results."""


class Trainer:
    """Runs a module's training steps and calls the callbacks' hooks.

    Attributes:
        max_epochs: the epoch to stop before.
        callbacks: in the order in which they are called.
        module: what is being trained; set by `fit`.
        global_step: optimizer steps taken since the first run started.
        current_epoch: counted from 0.
        batches_done: batches of the current epoch already trained on.
        is_last_batch: whether the batch being trained on is the last of its epoch.
        callback_metrics: newest value of each metric, possibly still being computed.
        resumed_at: the step of the checkpoint this run went on from; None for a fresh start.
    """

    def __init__(self, *, max_epochs: int, callbacks: Sequence[object] = ()) -> None:
        """Prepares a run; `fit` starts it."""
        self.max_epochs = max_epochs
        self.callbacks = list(callbacks)
        self.module: Module
        self.global_step = 0
        self.current_epoch = 0
        self.batches_done = 0
        self.is_last_batch = False
        self.callback_metrics: dict[str, Any] = {}
        self.resumed_at: int | None = None

    @property
    def state(self) -> dict[str, Tree]:
        """All that a checkpoint needs: the module's state and the trainer's own counters."""
        return {**self.module.state(), "progress": self.state_dict()}

    def state_dict(self) -> dict[str, int]:
        """Where the training is; complete only together with the module's state."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to where `state_dict` was taken."""
        for name in _COUNTERS:
            setattr(self, name, state[name])

    def fit(self, module: Module) -> None:
        """Trains up to `max_epochs`, from the newest checkpoint that a callback can restore.

        Raises:
            Exception: whatever the module or a callback raised. The callbacks' `on_exception` and
                `teardown` have run by then.
        """
        self.module = module
        self._call("setup", module, "fit")
        try:
            self._call("on_fit_start", module)
            self._resume()
            self._call("on_train_start", module)
            while self.current_epoch < self.max_epochs:
                self._run_epoch()
            self._call("on_train_end", module)
            self._call("on_fit_end", module)
        except BaseException as exception:
            self._call("on_exception", module, exception)
            raise
        finally:
            self._call("teardown", module, "fit")

    def layer_ready(self, name: str, tree: Tree) -> None:
        """For modules: the step's new parameters of layer `name` are issued."""
        self._call("on_layer_ready", name, tree)

    def optimizer_state_ready(self, name: str, tree: Tree) -> None:
        """For modules: the step's new optimizer state of layer `name` is issued."""
        self._call("on_optimizer_state_ready", name, tree)

    def _resume(self) -> None:
        """Restores from the first callback that can; it has finished what a killed run left."""
        for callback in self.callbacks:
            restore = getattr(callback, "restore", None)
            if restore is None:
                continue
            # Of several processes each has its own stages, and needs no leaves of the others'.
            restored = restore(self.state, partial=jax.process_count() > 1)
            if restored is not None:
                state, self.resumed_at = restored
                self.module.load_state(state)
                self.load_state_dict(state["progress"])
            break
        if self.batches_done == self.module.batches_per_epoch:
            self._begin_epoch(self.current_epoch + 1)

    def _begin_epoch(self, epoch: int) -> None:
        self.current_epoch = epoch
        self.batches_done = 0

    def _run_epoch(self) -> None:
        self._call("on_train_epoch_start", self.module)
        batches = self.module.batches(self.current_epoch, self.batches_done)
        for batch_idx, batch in enumerate(batches, start=self.batches_done):
            self._run_batch(batch, batch_idx)
        self._call("on_train_epoch_end", self.module)
        self._begin_epoch(self.current_epoch + 1)

    def _run_batch(self, batch: Any, batch_idx: int) -> None:
        self.is_last_batch = batch_idx + 1 == self.module.batches_per_epoch
        self._call("on_train_batch_start", self.module, batch, batch_idx)
        outputs = self.module.training_step(self, batch, batch_idx)
        # One step may run while the next is being issued; more would only pile up memory.
        jax.block_until_ready(self.callback_metrics)
        self.callback_metrics.update(outputs)
        self.global_step += 1
        self.batches_done = batch_idx + 1
        self._call("on_train_batch_end", self.module, outputs, batch, batch_idx)

    def _call(self, hook: str, *arguments: object) -> None:
        for callback in self.callbacks:
            function = getattr(callback, hook, None)
            if function is not None:
                function(self, *arguments)
