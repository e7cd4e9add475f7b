"""What one process of several trains: one stage of the pipeline, and nothing of the others.

Every process reads the same text and draws the same batches, so only activations and gradients pass
between them. Its state is that of its own layers, under the names they have in the whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from lm_link import Link
from lm_module import MICRO_BATCHES, WINDOWS, find, mean_losses, nest
from lm_pipeline import init_layers, layer_graphs, split_stages
from lm_text import epoch_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_model import ModelConfig
    from lm_text import Corpus
    from numpy.typing import NDArray
    from trainer import Trainer

Tree = Any


class StageModule:
    """The stage of this process, for `trainer.Trainer`; every stage's process has a trainer.

    Attributes:
        batches_per_epoch: how many batches, drawn without repetition, an epoch has.
        epoch_loss: float32 scalar, of the last epoch; known to the last stage only.
        is_last: whether this is the last stage.
    """

    def __init__(
        self, config: ModelConfig, corpus: Corpus, *, batches_per_epoch: int, seed: int
    ) -> None:
        """Draws the stage's layers at their start; `load_state` takes them somewhere else."""
        number, count = jax.process_index(), jax.process_count()
        self.batches_per_epoch = batches_per_epoch
        self.is_last = number == count - 1
        self._corpus = corpus
        self._length = config.length
        self._stage = split_stages(layer_graphs(config), count)[number]
        shape = (WINDOWS // MICRO_BATCHES, config.length, config.width)
        # Links are made in the order of the pipeline: making one involves both of its ends.
        self._before = Link(number - 1, shape=shape) if number else None
        self._after = None if self.is_last else Link(number, shape=shape)
        self.epoch_loss = jax.device_put(np.float32(0), self._stage.device)
        init_key, self._dropout_key, self._shuffle_key = jax.random.split(jax.random.key(seed), 3)
        self._stage.place(*init_layers(config, init_key, only=self._stage.names), self._dropout_key)

    def state(self) -> dict[str, Tree]:
        """What later steps of this stage depend on; keys and counters are the same in all."""
        metrics = {"metrics": {"epoch_loss": self.epoch_loss}} if self.is_last else {}
        return {
            "params": nest(self._stage.params),
            "opt_state": nest(self._stage.opt_state),
            "rngs": {"dropout": self._dropout_key, "shuffle": self._shuffle_key},
            **metrics,
        }

    def load_state(self, state: Mapping[str, Tree]) -> None:
        """Takes over the state of this stage's layers, whichever stages had them before."""
        self._dropout_key = state["rngs"]["dropout"]
        self._shuffle_key = state["rngs"]["shuffle"]
        if self.is_last:
            self.epoch_loss = state["metrics"]["epoch_loss"]
        params, opt_state = (
            {name: find(state[root], name) for name in self._stage.names}
            for root in ("params", "opt_state")
        )
        self._stage.place(params, opt_state, self._dropout_key)

    def batches(self, epoch: int, start: int) -> Iterator[NDArray[np.int32]]:
        """The epoch's batches from number `start` on: int32 [windows, length + 1]."""
        return epoch_batches(
            self._corpus,
            jax.random.fold_in(self._shuffle_key, epoch),
            windows=WINDOWS,
            length=self._length,
            numbers=range(start, self.batches_per_epoch),
        )

    def training_step(
        self, trainer: Trainer, batch: NDArray[np.int32], batch_idx: int
    ) -> dict[str, jax.Array]:
        """Runs this stage's passes in GPipe order; tells the trainer of its new state."""
        stage, step = self._stage, trainer.global_step
        parts = np.split(batch, MICRO_BATCHES)
        targets = [self._targets(part) for part in parts]
        inputs, losses = [], []
        for number, part in enumerate(parts):
            inputs.append(self._input(part))
            y = stage.forward(inputs[-1], targets[number], step, number)
            if self._after is None:
                losses.append(y)
            else:
                self._after.send_down(y)
        for number in reversed(range(MICRO_BATCHES)):
            dy = np.float32(1 / MICRO_BATCHES) if self._after is None else self._after.receive_up()
            dx = stage.backward(inputs.pop(), targets[number], dy, step, number)
            if self._before is not None and dx is not None:
                self._before.send_up(dx)
        stage.update()
        for name in reversed(stage.names):
            trainer.layer_ready(name, stage.params[name])
            trainer.optimizer_state_ready(name, stage.opt_state[name])
        if not self.is_last:
            return {}
        loss, self.epoch_loss = mean_losses(losses, self.epoch_loss, np.float32(batch_idx))
        return {"loss": loss, "epoch_loss": self.epoch_loss}

    def _targets(self, part: NDArray[np.int32]) -> jax.Array | None:
        return jax.device_put(part[:, 1:], self._stage.device) if self.is_last else None

    def _input(self, part: NDArray[np.int32]) -> jax.Array:
        if self._before is not None:
            return self._before.receive_down()
        return jax.device_put(part[:, :-1], self._stage.device)
