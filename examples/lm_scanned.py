"""The language model of `lm_model`, its blocks stacked in one tree and scanned, in one jitted step.

Every parameter of the blocks is one array `[layers, ...]`, sharded over the mesh's axis "stage": a
stage keeps its own layers, with their optimizer state. The batch is spread over the stages, too, so
each of them computes, on its share of the batch, with one layer's parameters at a time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lm_model import Block, Embed, Head
from lm_pipeline import make_optimizer
from lm_text import epoch_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_model import Layer, ModelConfig
    from lm_text import Corpus
    from numpy.typing import NDArray
    from trainer import Trainer

STACK = "blocks"
WINDOWS = 8

Tree = Any


class ScannedModel:
    """A scanned language model, for `trainer.Trainer`.

    Its state:

        params.embed, params.blocks, params.head    of the blocks, arrays [layers, ...]
        opt_state                                   Optax's, of all parameters together
        rngs.dropout, rngs.shuffle                  never changed: step and epoch are folded in
        metrics.epoch_loss                          mean over the epoch's steps so far

    Attributes:
        batches_per_epoch: how many batches, drawn without repetition, an epoch has.
        epoch_loss: float32 scalar, of the last epoch that was trained on.
    """

    def __init__(
        self, config: ModelConfig, corpus: Corpus, *, stages: int, batches_per_epoch: int, seed: int
    ) -> None:
        """Draws the model at its start; `load_state` takes it somewhere else."""
        self.batches_per_epoch = batches_per_epoch
        self.epoch_loss: Any = np.float32(0)
        self._corpus = corpus
        self._config = config
        mesh = Mesh(np.array(jax.devices()[:stages]), ("stage",))
        self._over_stages = NamedSharding(mesh, PartitionSpec("stage"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        keys = jax.device_put(jax.random.split(jax.random.key(seed), 3), self._everywhere)
        init_key, self._dropout_key, self._shuffle_key = keys
        init = functools.partial(_init, config)
        shardings = self._shardings(jax.eval_shape(init, init_key))
        self._train = jax.jit(
            functools.partial(_train, _graphs(config)),
            donate_argnums=0,
            in_shardings=(shardings, self._over_stages, None),
            out_shardings=(shardings, self._everywhere),
        )
        self._trained = jax.jit(init, out_shardings=shardings)(init_key)

    def _shardings(self, tree: Tree) -> Tree:
        """Over the stages whatever belongs to the blocks, everything else everywhere."""

        def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
            is_stacked = any(getattr(key, "key", None) == STACK for key in path)
            return self._over_stages if is_stacked else self._everywhere

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def state(self) -> dict[str, Tree]:
        """Everything that later steps depend on, where it is now."""
        return {
            **self._trained,
            "rngs": {"dropout": self._dropout_key, "shuffle": self._shuffle_key},
            "metrics": {"epoch_loss": self.epoch_loss},
        }

    def load_state(self, state: Mapping[str, Tree]) -> None:
        """Takes over a state."""
        self._trained = {root: state[root] for root in self._trained}
        self._dropout_key = state["rngs"]["dropout"]
        self._shuffle_key = state["rngs"]["shuffle"]
        self.epoch_loss = state["metrics"]["epoch_loss"]

    def batches(self, epoch: int, start: int) -> Iterator[NDArray[np.int32]]:
        """The epoch's batches from number `start` on: int32 [windows, length + 1]."""
        return epoch_batches(
            self._corpus,
            jax.random.fold_in(self._shuffle_key, epoch),
            windows=WINDOWS,
            length=self._config.length,
            numbers=range(start, self.batches_per_epoch),
        )

    def training_step(
        self, trainer: Trainer, batch: NDArray[np.int32], batch_idx: int
    ) -> dict[str, jax.Array]:
        """Issues a step, which uses up the state of the one before."""
        key = jax.random.fold_in(self._dropout_key, np.uint32(trainer.global_step))
        self._trained, loss = self._train(self._trained, batch, key)
        before = jnp.where(batch_idx == 0, 0.0, self.epoch_loss)
        self.epoch_loss = before + (loss - before) / (batch_idx + 1)
        return {"loss": loss, "epoch_loss": self.epoch_loss}


def _init_layer(kind: type[Layer], config: ModelConfig, key: jax.Array) -> Tree:
    return nnx.to_pure_dict(nnx.state(kind(config, nnx.Rngs(key)), nnx.Param))


def _init(config: ModelConfig, key: jax.Array) -> dict[str, Tree]:
    embed_key, blocks_key, head_key = jax.random.split(key, 3)
    init_block = functools.partial(_init_layer, Block, config)
    params = {
        "embed": _init_layer(Embed, config, embed_key),
        STACK: jax.vmap(init_block)(jax.random.split(blocks_key, config.layers)),
        "head": _init_layer(Head, config, head_key),
    }
    return {"params": params, "opt_state": make_optimizer().init(params)}


def _graphs(config: ModelConfig) -> dict[str, nnx.GraphDef[Any]]:
    """The three kinds of layers without their parameters, by where their parameters are."""
    kinds: dict[str, type[Layer]] = {"embed": Embed, STACK: Block, "head": Head}
    return {
        name: nnx.split(nnx.eval_shape(lambda kind=kind: kind(config, nnx.Rngs(0))))[0]
        for name, kind in kinds.items()
    }


def _loss(
    graphs: Mapping[str, nnx.GraphDef[Any]], params: Tree, batch: jax.Array, key: jax.Array
) -> jax.Array:
    embed_key, blocks_key, head_key = jax.random.split(key, 3)
    x = nnx.merge(graphs["embed"], params["embed"])(batch[:, :-1], embed_key)

    def block(x: jax.Array, layer: tuple[Tree, jax.Array]) -> tuple[jax.Array, None]:
        return nnx.merge(graphs[STACK], layer[0])(x, layer[1]), None

    layers = len(jax.tree.leaves(params[STACK])[0])
    x, _ = jax.lax.scan(block, x, (params[STACK], jax.random.split(blocks_key, layers)))
    logits = nnx.merge(graphs["head"], params["head"])(x, head_key)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))


def _train(
    graphs: Mapping[str, nnx.GraphDef[Any]], trained: Tree, batch: jax.Array, key: jax.Array
) -> tuple[dict[str, Tree], jax.Array]:
    """One AdamW step."""
    params = trained["params"]
    loss, grads = jax.value_and_grad(functools.partial(_loss, graphs))(params, batch, key)
    updates, opt_state = make_optimizer().update(grads, trained["opt_state"], params)
    return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, loss
