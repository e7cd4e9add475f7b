"""The model: a small pre-norm transformer in Flax NNX, as a sequence of layers.

A layer is the embedding, one block, or the head; a pipeline stage owns whole layers. All of them
are called as `layer(x, dropout_key)`, so a stage is simply a run of consecutive layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

DROPOUT = 0.1
HEAD_WIDTH = 32


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; `width` is a multiple of `HEAD_WIDTH`."""

    vocabulary: int
    length: int
    width: int
    layers: int


class Embed(nnx.Module):
    """Token and position embeddings: int32 [batch, length] to float32 [batch, length, width]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Draws the two tables."""
        init = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(config.vocabulary, config.width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(config.length, config.width, embedding_init=init, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT)

    def __call__(self, tokens: jax.Array, key: jax.Array) -> jax.Array:
        """Looks up every token and adds its position."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        return self.dropout(x, rngs=key)


class Block(nnx.Module):
    """Causal self-attention and a feed-forward network, each around a residual connection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Draws the weights; both outputs into the residual stream start small."""
        width = config.width
        into_stream = nnx.initializers.normal(0.02 / (2 * config.layers) ** 0.5)
        self.heads = width // HEAD_WIDTH
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, kernel_init=into_stream)
        self.norm_feedforward = nnx.LayerNorm(width, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, kernel_init=into_stream)
        self.dropout = nnx.Dropout(DROPOUT)

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Maps float32 [batch, length, width] to the same shape."""
        attention_key, feedforward_key = jax.random.split(key)
        x = x + self.dropout(self._attend(self.norm_attention(x)), rngs=attention_key)
        hidden = nnx.gelu(self.up(self.norm_feedforward(x)))
        return x + self.dropout(self.down(hidden), rngs=feedforward_key)

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, HEAD_WIDTH)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(batch, length, width))


class Head(nnx.Module):
    """Final norm and the logits: float32 [batch, length, width] to [batch, length, vocabulary]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Draws the output matrix."""
        init = nnx.initializers.normal(0.02)
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.logits = nnx.Linear(
            config.width, config.vocabulary, use_bias=False, kernel_init=init, rngs=rngs
        )

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the logits; `key` is there because every layer takes one."""
        del key
        return self.logits(self.norm(x))


Layer = Embed | Block | Head


def layer_kinds(config: ModelConfig) -> dict[str, type[Layer]]:
    """Returns the model's layers in order, by global name: embed, blocks.0, ..., head."""
    blocks = {f"blocks.{index}": Block for index in range(config.layers)}
    return {"embed": Embed, **blocks, "head": Head}


def draw_params(kind: type[Layer], config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Draws a layer's parameters, as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(kind(config, nnx.Rngs(key)), nnx.Param))


def graph_of(kind: type[Layer], config: ModelConfig) -> nnx.GraphDef[Layer]:
    """Returns a layer without its parameters; computes nothing."""
    return nnx.split(nnx.eval_shape(lambda: kind(config, nnx.Rngs(0))))[0]
