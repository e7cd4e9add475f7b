"""What the trainer trains: a model, its text and its keys, with one state to save and load."""

from __future__ import annotations

import functools
import hashlib
from operator import getitem
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from lm_pipeline import init_layers, train_step

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_model import ModelConfig
    from lm_pipeline import Layers, Stage
    from lm_text import Batches
    from numpy.typing import NDArray
    from trainer import Trainer

WINDOWS = 16
MICRO_BATCHES = 4

Tree = Any


class LanguageModel:
    """What every language model here has for `trainer.Trainer`: batches, keys and the mean loss.

    Its state:

        params, opt_state               those of the model: what `trained` returns
        rngs.dropout, rngs.shuffle      never changed: step and epoch are folded in
        metrics.epoch_loss              mean over the epoch's steps so far

    Attributes:
        batches_per_epoch: how many batches, drawn without repetition, an epoch has.
        epoch_loss: float32 scalar, of the last epoch that was trained on; None in a process that
            does not compute the loss, whose state is then without metrics.
        rngs: the keys for dropout and for shuffling.
    """

    def __init__(self, batches: Batches, *, seed: int) -> None:
        """Draws the keys."""
        self.batches_per_epoch = batches.per_epoch
        self.epoch_loss: Any = np.float32(0)
        self._batches = batches
        self._init_key, dropout, shuffle = jax.random.split(jax.random.key(seed), 3)
        self.rngs = {"dropout": dropout, "shuffle": shuffle}

    def trained(self) -> dict[str, Tree]:
        """Returns the parameters, and their optimizer state, where they are now."""
        raise NotImplementedError

    def load_trained(self, state: Mapping[str, Tree]) -> None:
        """Replaces the state by what `trained` returned in another run."""
        raise NotImplementedError

    def state(self) -> dict[str, Tree]:
        """Everything that later steps depend on, where it is now."""
        has_loss = self.epoch_loss is not None
        metrics = {"metrics": {"epoch_loss": self.epoch_loss}} if has_loss else {}
        return {**self.trained(), "rngs": self.rngs, **metrics}

    def load_state(self, state: Mapping[str, Tree]) -> None:
        """Replaces the state by one that `state` returned."""
        self.rngs = dict(state["rngs"])
        if self.epoch_loss is not None:
            self.epoch_loss = state["metrics"]["epoch_loss"]
        self.load_trained(state)

    def batches(self, epoch: int, start: int) -> Iterator[NDArray[np.int32]]:
        """The epoch's batches from number `start` on: int32 [windows, length + 1]."""
        return self._batches.of_epoch(jax.random.fold_in(self.rngs["shuffle"], epoch), start)

    def metrics_of(self, losses: list[jax.Array], batch_idx: int) -> dict[str, jax.Array]:
        """Returns the metrics of a step with these losses; it goes into the epoch's mean."""
        loss, self.epoch_loss = _mean_losses(losses, self.epoch_loss, np.float32(batch_idx))
        return {"loss": loss, "epoch_loss": self.epoch_loss}


class PipelineModel(LanguageModel):
    """A language model on pipeline stages: all of them, or the one of this process.

    Its state has the names of the whole model, however many stages and processes there are:
    `params.<layer>` and `opt_state.<layer>` for the layers embed, blocks.0, blocks.1, ..., head.
    """

    def __init__(
        self,
        config: ModelConfig,
        batches: Batches,
        stages: Sequence[Stage],
        *,
        seed: int,
        micro_batches: int = MICRO_BATCHES,
    ) -> None:
        """Draws the stages' layers at their start; `load_state` replaces them."""
        super().__init__(batches, seed=seed)
        self._stages = stages
        self._micro_batches = micro_batches
        self._names = [name for stage in stages for name in stage.names]
        last = stages[-1]
        self.epoch_loss = jax.device_put(self.epoch_loss, last.device) if last.is_last else None
        self._place(init_layers(config, self._init_key, self._names))

    def _place(self, layers: Layers) -> None:
        for stage in self._stages:
            stage.place(layers, self.rngs["dropout"])

    def trained(self) -> dict[str, Tree]:
        """Returns the parameters and optimizer state of the stages here, nested by layer."""
        merged: Layers = {"params": {}, "opt_state": {}}
        for stage in self._stages:
            merged["params"] |= stage.params
            merged["opt_state"] |= stage.opt_state
        return {root: unflatten_dict(layers, sep=".") for root, layers in merged.items()}

    def load_trained(self, state: Mapping[str, Tree]) -> None:
        """Moves each layer to the stage that has it in this run."""
        keys = {name: name.split(".") for name in self._names}
        self._place(
            {
                root: {name: functools.reduce(getitem, keys[name], state[root]) for name in keys}
                for root in ("params", "opt_state")
            }
        )

    def training_step(
        self, trainer: Trainer, batch: NDArray[np.int32], batch_idx: int
    ) -> dict[str, jax.Array]:
        """Issues a step; hands each stage's new state to the trainer as soon as it is issued."""

        def hand_over(stage: Stage) -> None:
            for name in reversed(stage.names):
                trainer.layer_ready(name, stage.params[name])
                trainer.optimizer_state_ready(name, stage.opt_state[name])

        parts = np.split(batch, self._micro_batches)
        losses = train_step(self._stages, parts, trainer.global_step, hand_over)
        return self.metrics_of(losses, batch_idx) if losses else {}


@jax.jit
def _mean_losses(
    losses: list[jax.Array], epoch_loss: jax.Array, steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The step's loss, and the epoch's so far, which was the mean over `steps` before."""
    loss = jnp.mean(jnp.stack(losses))
    return loss, epoch_loss + (loss - epoch_loss) / (steps + 1)


def digest(tree: Tree) -> str:
    """A fingerprint of every name, dtype, shape and byte of a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]
