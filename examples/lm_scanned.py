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
from lm_model import Block, Embed, Head, draw_params, graph_of
from lm_module import LanguageModel
from lm_pipeline import make_optimizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_model import Layer, ModelConfig
    from lm_text import Batches
    from numpy.typing import NDArray
    from trainer import Trainer

STACK = "blocks"
WINDOWS = 8

Tree = Any


class ScannedModel(LanguageModel):
    """A scanned language model.

    Its parameters are `params.embed`, `params.blocks` (arrays [layers, ...]) and `params.head`;
    `opt_state` is Optax's, of all of them together.
    """

    def __init__(self, config: ModelConfig, batches: Batches, *, stages: int, seed: int) -> None:
        """Draws the model at its start; `load_state` replaces it."""
        super().__init__(batches, seed=seed)
        mesh = Mesh(np.array(jax.devices()[:stages]), ("stage",))
        self._over_stages = NamedSharding(mesh, PartitionSpec("stage"))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self.rngs, init_key = jax.device_put((self.rngs, self._init_key), self._everywhere)
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
        """What belongs to the blocks is sharded over the stages, everything else replicated."""

        def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
            is_stacked = any(getattr(key, "key", None) == STACK for key in path)
            return self._over_stages if is_stacked else self._everywhere

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def trained(self) -> dict[str, Tree]:
        """Returns the parameters and optimizer state, sharded over the stages."""
        return self._trained

    def load_trained(self, state: Mapping[str, Tree]) -> None:
        """Replaces parameters and optimizer state."""
        self._trained = {root: state[root] for root in self._trained}

    def training_step(
        self, trainer: Trainer, batch: NDArray[np.int32], batch_idx: int
    ) -> dict[str, jax.Array]:
        """Issues a step, which uses up the state of the one before."""
        key = jax.random.fold_in(self.rngs["dropout"], np.uint32(trainer.global_step))
        self._trained, loss = self._train(self._trained, batch, key)
        return self.metrics_of([loss], batch_idx)


def _init(config: ModelConfig, key: jax.Array) -> dict[str, Tree]:
    embed_key, blocks_key, head_key = jax.random.split(key, 3)
    draw_block = functools.partial(draw_params, Block, config)
    params = {
        "embed": draw_params(Embed, config, embed_key),
        STACK: jax.vmap(draw_block)(jax.random.split(blocks_key, config.layers)),
        "head": draw_params(Head, config, head_key),
    }
    return {"params": params, "opt_state": make_optimizer().init(params)}


def _graphs(config: ModelConfig) -> dict[str, nnx.GraphDef[Any]]:
    """The three kinds of layers without their parameters, by where their parameters are."""
    kinds: dict[str, type[Layer]] = {"embed": Embed, STACK: Block, "head": Head}
    return {name: graph_of(kind, config) for name, kind in kinds.items()}


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
