"""The least a trainer can be: it has what the callback reads, and no more.

It trains nothing. Every array of its state is full of the number of steps taken, so that a
checkpoint with parts of two steps shows; and each step donates the arrays of the one before.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flax_partial.callbacks import PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

LAYERS = ("embed", "blocks.0", "blocks.1", "head")
ROOTS = ("params", "opt_state")
EVERYTHING = frozenset((root, layer) for root in ROOTS for layer in LAYERS)
PARAMS = frozenset(("params", layer) for layer in LAYERS)
ROWS = 300


class StubTrainer:
    """Only what a callback may read."""

    __slots__ = ("callback_metrics", "current_epoch", "global_step", "is_last_batch", "state")

    def __init__(self) -> None:
        self.global_step = 0
        self.current_epoch = 0
        self.callback_metrics: dict[str, Any] = {}
        self.is_last_batch = False
        self.state: Any = new_state(0)


class StoppableTrainer(StubTrainer):
    """One that can be told to stop, as Lightning's."""

    __slots__ = ("should_stop",)

    def __init__(self) -> None:
        super().__init__()
        self.should_stop = False


def new_state(step: int) -> dict[str, Any]:
    """The state after so many steps."""
    layer = {"w": jnp.full((ROWS, 2), step, jnp.float32), "b": jnp.full((2,), step, jnp.bfloat16)}
    params = {"embed": layer, "blocks": {"0": layer, "1": layer}, "head": layer}
    state = {"params": params, "opt_state": params, "seen": jnp.int32(step)}
    return jax.tree.map(jnp.copy, state)


@functools.partial(jax.jit, donate_argnums=0)
def _one_more(state: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), state)


def layer_of(state: Mapping[str, Any], root: str, name: str) -> Any:
    """The tree of one layer in a state."""
    tree = state[root]
    for key in name.split("."):
        tree = tree[key]
    return tree


class Loop:
    """Calls the hooks in Lightning's order.

    Args:
      callbacks: What to call.
      epochs: Number of epochs in all, those before `resume` included.
      batches: Number of steps in each.
      streamed: (root, layer) of what is handed over as it becomes ready.
      receivers: Root to the callback that gets what is streamed of it; by default, the first one.
      metrics: From the step to the metrics then.
      at: Hook name to what to do right before it is called: `at["on_train_epoch_end"](trainer)`;
        "ready" stands for the moment after everything was streamed.
      counts_first: Whether `global_step` is counted before layers are streamed.
      starts_batches: Whether `on_train_batch_start` is called.
      trainer: What trains; by default, a new `StubTrainer`.
    """

    def __init__(
        self,
        *callbacks: Any,
        epochs: int = 1,
        batches: int = 2,
        streamed: Iterable[tuple[str, str]] = (),
        receivers: Mapping[str, Any] | None = None,
        metrics: Callable[[int], Mapping[str, Any]] | None = None,
        at: Mapping[str, Callable[[StubTrainer], None]] | None = None,
        counts_first: bool = False,
        starts_batches: bool = True,
        trainer: StubTrainer | None = None,
    ) -> None:
        self.trainer = trainer or StubTrainer()
        self.callbacks: Sequence[Any] = callbacks
        self._epochs = epochs
        self._batches = batches
        self._streamed = frozenset(streamed)
        self._receivers = receivers or dict.fromkeys(ROOTS, callbacks[0])
        self._metrics = metrics
        self._at = dict(at or {})
        self._counts_first = counts_first
        self._starts_batches = starts_batches

    def resume(self, state: Any, step: int) -> Loop:
        """Starts where a checkpoint stopped."""
        self.trainer.state, self.trainer.global_step = state, step
        self.trainer.current_epoch = step // self._batches
        return self

    def fit(self, module: Any = None) -> StubTrainer:
        """Runs the whole training."""
        trainer = self.trainer
        try:
            self._call("setup", trainer, module, "fit")
            self._call("on_fit_start", trainer, module)
            self._call("on_train_start", trainer, module)
            while trainer.current_epoch < self._epochs and not self._should_stop:
                for batch in range(trainer.global_step % self._batches, self._batches):
                    if not self._should_stop:
                        self._step(module, batch)
                self._call("on_train_epoch_end", trainer, module)
                trainer.current_epoch += 1
            self._call("on_train_end", trainer, module)
        except BaseException as error:
            self._call("on_exception", trainer, module, error)
            raise
        finally:
            self._call("teardown", trainer, module, "fit")
        return trainer

    @property
    def _should_stop(self) -> bool:
        return getattr(self.trainer, "should_stop", False)

    def _step(self, module: Any, batch: int) -> None:
        trainer = self.trainer
        trainer.is_last_batch = batch == self._batches - 1
        if self._starts_batches:
            self._call("on_train_batch_start", trainer, module, None, batch)
        trainer.state = _one_more(trainer.state)
        trainer.global_step += self._counts_first
        self._stream()
        trainer.global_step += not self._counts_first
        if self._metrics is not None:
            trainer.callback_metrics = dict(self._metrics(trainer.global_step))
        self._call("on_train_batch_end", trainer, module, None, None, batch)

    def _stream(self) -> None:
        for root, name in sorted(self._streamed, reverse=True):
            tree = layer_of(self.trainer.state, root, name)
            hook = "on_layer_ready" if root == "params" else "on_optimizer_state_ready"
            getattr(self._receivers[root], hook)(self.trainer, name, tree)
        self._at.get("ready", _nothing)(self.trainer)

    def _call(self, hook: str, trainer: StubTrainer, *arguments: Any) -> None:
        self._at.get(hook, _nothing)(trainer)
        for callback in self.callbacks:
            getattr(callback, hook)(trainer, *arguments)


def _nothing(_: StubTrainer) -> None:
    pass


_OF_THE_LOOP = frozenset(inspect.signature(Loop.__init__).parameters)


def fitted(directory: Path, **options: Any) -> PartialCheckpointCallback:
    """Trains with a callback; options are those of `Loop` and of the callback."""
    of_loop = {name: value for name, value in options.items() if name in _OF_THE_LOOP}
    of_callback = {name: value for name, value in options.items() if name not in _OF_THE_LOOP}
    callback = PartialCheckpointCallback(directory, **of_callback)
    Loop(callback, **of_loop).fit()
    return callback


def begun(callback: PartialCheckpointCallback) -> StubTrainer:
    """A trainer whose training begins, for tests that call the hooks themselves."""
    trainer = StubTrainer()
    callback.on_fit_start(trainer, None)
    return trainer


def end_step(
    callback: PartialCheckpointCallback, trainer: StubTrainer, step: int, *, is_last: bool = False
) -> None:
    """Ends a step of it."""
    trainer.global_step, trainer.state, trainer.is_last_batch = step, new_state(step), is_last
    callback.on_train_batch_end(trainer, None, None, None, step)


def restored(callback: PartialCheckpointCallback, target: Any = None, **how: Any) -> Any:
    """What the callback restores, and its step; there is a checkpoint."""
    found = callback.restore(target, **how)
    assert found is not None
    return found


def raise_zero_division(_: StubTrainer) -> None:
    """What a training step may do."""
    raise ZeroDivisionError


def run_program(code: str, *arguments: object, check: bool = True) -> int:
    """Runs a program that may import what tests import; returns its exit status."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        check=check,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=500,
    ).returncode
