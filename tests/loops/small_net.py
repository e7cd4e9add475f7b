"""A network of a few numbers, for loops that train NNX modules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    """Two layers, each in its own place of a list."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Inputs and outputs are [batch, 3]."""
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return x


def loss_of(model: Net, x: jax.Array) -> jax.Array:
    """Mean square of how far the outputs are from one half."""
    return jnp.square(model(x) - 0.5).mean()
