"""What the trainer trains: the pipeline, its text and its keys, with one state to save and load."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_pipeline import Pipeline, init_layers
from lm_text import epoch_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_model import ModelConfig
    from lm_pipeline import ByLayer, Stage
    from lm_text import Corpus
    from numpy.typing import NDArray
    from trainer import Trainer

WINDOWS = 16
MICRO_BATCHES = 4

Tree = Any


class LanguageModel:
    """A language model on pipeline stages, for `trainer.Trainer`.

    Its state is that of the whole model, however many stages there are:

        params.<layer>, opt_state.<layer>    with the layers embed, blocks.0, blocks.1, ..., head
        rngs.dropout, rngs.shuffle           never changed: step and epoch are folded in
        metrics.epoch_loss                   mean over the epoch's steps so far

    Attributes:
        batches_per_epoch: how many batches, drawn without repetition, an epoch has.
        epoch_loss: float32 scalar, of the last epoch that was trained on.
    """

    def __init__(
        self,
        config: ModelConfig,
        corpus: Corpus,
        *,
        stages: int,
        batches_per_epoch: int,
        seed: int,
        windows: int = WINDOWS,
        micro_batches: int = MICRO_BATCHES,
    ) -> None:
        """Draws the model at its start; `load_state` takes it somewhere else."""
        self.batches_per_epoch = batches_per_epoch
        self._corpus = corpus
        self._windows = windows
        self._length = config.length
        self._pipeline = Pipeline(config, stages=stages, micro_batches=micro_batches)
        self.epoch_loss = jax.device_put(np.float32(0), self._pipeline.stages[-1].device)
        init_key, self._dropout_key, self._shuffle_key = jax.random.split(jax.random.key(seed), 3)
        self._pipeline.place(*init_layers(config, init_key), self._dropout_key)

    def state(self) -> dict[str, Tree]:
        """Everything that later steps depend on, where it is now: each layer on its stage."""
        return {
            "params": nest(self._pipeline.params),
            "opt_state": nest(self._pipeline.opt_state),
            "rngs": {"dropout": self._dropout_key, "shuffle": self._shuffle_key},
            "metrics": {"epoch_loss": self.epoch_loss},
        }

    def load_state(self, state: Mapping[str, Tree]) -> None:
        """Takes over a state, each layer to the stage that has it in this run."""
        self._dropout_key = state["rngs"]["dropout"]
        self._shuffle_key = state["rngs"]["shuffle"]
        self.epoch_loss = state["metrics"]["epoch_loss"]
        names = self._pipeline.params
        params, opt_state = (
            {name: find(state[root], name) for name in names} for root in ("params", "opt_state")
        )
        self._pipeline.place(params, opt_state, self._dropout_key)

    def batches(self, epoch: int, start: int) -> Iterator[NDArray[np.int32]]:
        """The epoch's batches from number `start` on: int32 [windows, length + 1]."""
        return epoch_batches(
            self._corpus,
            jax.random.fold_in(self._shuffle_key, epoch),
            windows=self._windows,
            length=self._length,
            numbers=range(start, self.batches_per_epoch),
        )

    def training_step(
        self, trainer: Trainer, batch: NDArray[np.int32], batch_idx: int
    ) -> dict[str, jax.Array]:
        """Issues a step; tells the trainer of each stage's new state as soon as it is issued."""

        def tell(stage: Stage) -> None:
            for name in reversed(stage.names):
                trainer.layer_ready(name, stage.params[name])
                trainer.optimizer_state_ready(name, stage.opt_state[name])

        losses = self._pipeline.train_step(batch, trainer.global_step, tell)
        loss, self.epoch_loss = mean_losses(losses, self.epoch_loss, np.float32(batch_idx))
        return {"loss": loss, "epoch_loss": self.epoch_loss}


@jax.jit
def mean_losses(
    losses: list[jax.Array], epoch_loss: jax.Array, steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The step's loss, and the epoch's so far, which was the mean over `steps` before."""
    loss = jnp.mean(jnp.stack(losses))
    return loss, epoch_loss + (loss - epoch_loss) / (steps + 1)


def nest(layers: ByLayer) -> dict[str, Tree]:
    """From {"blocks.0": tree} to {"blocks": {"0": tree}}."""
    nested: dict[str, Tree] = {}
    for name, tree in layers.items():
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tree
    return nested


def find(nested: Mapping[str, Tree], name: str) -> Tree:
    """What stands in a nested tree under a name with dots."""
    node: Tree = nested
    for key in name.split("."):
        node = node[key]
    return node


def digest(tree: Tree) -> str:
    """A fingerprint of every name, dtype, shape and byte of a tree of arrays."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]
