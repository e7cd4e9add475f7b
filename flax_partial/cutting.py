"""Boxes cut out of arrays on one device, there: nothing is moved, and nothing waited for."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

_NO_MESH = Mesh(np.empty((), object), ())


def cut(array: jax.Array, start: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
    """Returns a copy of a box of an array, on its device; the array may be donated afterwards.

    Args:
      array: An array on a single device.
      start: First index of the box along each axis.
      shape: Shape of the box.
    """
    # Under the mesh that a training loop has set, nothing may run on one of its devices alone.
    with jax.set_mesh(_NO_MESH):
        box: jax.Array = _cut(array, tuple(map(np.int32, start)), shape)
    return box


@functools.partial(jax.jit, static_argnums=2)
def _cut(array: jax.Array, start: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """Cuts by an index that is an argument: boxes of one shape share one program."""
    return jax.lax.dynamic_slice(array, [jnp.int32(at) for at in start], shape)
