"""How activations and gradients pass between two neighbouring stages.

In one process they are moved from device to device. Between two processes a link is a mesh of two
devices, one of each, and one program that both run: it moves the array of one device to the other
(`ppermute`, which is point to point on every backend). The other stages do not take part. On CPU,
JAX's collectives are those of gloo, which have to be run one after the other: both ends wait until
each is done.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

_ENDS = "ends"


class DeviceLink:
    """A link between two devices of this process, as `ProcessLink`; never waits for a result."""

    def __init__(self, above: jax.Device, below: jax.Device) -> None:
        """Connects a stage on `above` to the next, on `below`."""
        down: deque[jax.Array] = deque()
        up: deque[jax.Array] = deque()
        self.send_down = lambda x: down.append(jax.device_put(x, below))
        self.send_up = lambda dx: up.append(jax.device_put(dx, above))
        self.receive_down = down.popleft
        self.receive_up = up.popleft


class ProcessLink:
    """One of the two ends of a link between processes; waits for the other end."""

    def __init__(self, stage: int, *, shape: Sequence[int]) -> None:
        """Connects a stage to the next.

        Args:
            stage: the one nearer to the input; its number is that of its process.
            shape: of the arrays that pass, float32.
        """
        ends = [_device_of(stage), _device_of(stage + 1)]
        self._here = next(one for one in ends if one.process_index == jax.process_index())
        self._sharding = NamedSharding(Mesh(np.array(ends), (_ENDS,)), PartitionSpec(_ENDS))
        self._nothing = jax.device_put(jnp.zeros((1, *shape)), self._here)
        self._down = self._mover([(0, 1)])
        self._up = self._mover([(1, 0)])

    def send_down(self, x: jax.Array) -> None:
        """Sends an activation to the next stage; returns when it has arrived."""
        self._move(self._down, x[None])

    def receive_down(self) -> jax.Array:
        """Waits for the activation that the stage before sends."""
        return self._move(self._down, self._nothing)

    def send_up(self, dx: jax.Array) -> None:
        """Sends a gradient to the stage before; returns when it has arrived."""
        self._move(self._up, dx[None])

    def receive_up(self) -> jax.Array:
        """Waits for the gradient that the next stage sends."""
        return self._move(self._up, self._nothing)

    def _mover(self, way: list[tuple[int, int]]) -> jax.stages.Wrapped:
        move = functools.partial(jax.lax.ppermute, axis_name=_ENDS, perm=way)
        spec = PartitionSpec(_ENDS)
        mesh = self._sharding.mesh
        return jax.jit(jax.shard_map(move, mesh=mesh, in_specs=spec, out_specs=spec))

    def _move(self, mover: jax.stages.Wrapped, mine: jax.Array) -> jax.Array:
        shape = (2, *mine.shape[1:])
        both = jax.make_array_from_single_device_arrays(shape, self._sharding, [mine])
        moved = jax.block_until_ready(mover(both))
        (shard,) = moved.addressable_shards
        received: jax.Array = shard.data[0]
        return received


Link = DeviceLink | ProcessLink


def _device_of(process: int) -> jax.Device:
    return next(device for device in jax.devices() if device.process_index == process)
