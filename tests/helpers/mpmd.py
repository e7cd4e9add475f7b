"""A stand-in for frameworks of MPMD pipelines, whose arrays are in some groups of processes only.

As in JaxPP, every process has the whole tree. A `StageArray` has one `jax.Array` for each stage
that holds it, or none where this process belongs to no such stage; held by several stages it is
replicated. A stage is the devices of one process, or of this one alone.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from things import QUICK, one_step

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

LAYERS = 8
_AXES = ("stage", "x")


@dataclass(frozen=True)
class StageSharding:
    """Which stages hold an array, and how each shards it over its own devices."""

    devices: tuple[tuple[Any, ...], ...]  # of all stages
    stages: tuple[int, ...]
    spec: PartitionSpec

    @property
    def across(self) -> NamedSharding:
        """Over the devices of all stages that hold it."""
        return self._over(self.stages)

    @property
    def here(self) -> NamedSharding | None:
        """Over those of this process's stage; None where that holds nothing of it."""
        mine = [s for s in self.stages if self.devices[s][0].process_index == jax.process_index()]
        return self._over(mine[:1]) if mine else None

    def _over(self, stages: Sequence[int]) -> NamedSharding:
        return NamedSharding(Mesh(np.array([self.devices[s] for s in stages]), _AXES), self.spec)


class StageArray:
    """An array that some stages hold."""

    def __init__(
        self, arrays: list[jax.Array], sharding: StageSharding, shape: tuple[int, ...], dtype: Any
    ) -> None:
        self.arrays, self.sharding, self.shape, self.dtype = arrays, sharding, shape, dtype


def register() -> None:
    """Five lines of what a user of such a framework writes."""
    fp.register_leaf_type(
        StageArray,
        to_arrays=lambda x: jax.make_array_from_single_device_arrays(
            x.shape, x.sharding.across, _shards(x.arrays), dtype=x.dtype
        ),
        from_arrays=lambda like, array: StageArray(
            _local(like, array), like.sharding, array.shape, array.dtype
        ),
    )


def _shards(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [shard.data for array in arrays for shard in array.addressable_shards]


def _local(like: StageArray, array: jax.Array) -> list[jax.Array]:
    here = like.sharding.here
    if here is None:
        return []
    return [jax.make_array_from_single_device_arrays(array.shape, here, _shards([array]))]


def _made(value: np.ndarray, sharding: StageSharding) -> StageArray:
    here = sharding.here
    arrays = [] if here is None else [jax.device_put(value, here)]
    return StageArray(arrays, sharding, value.shape, value.dtype)


def _initial(stages: int) -> dict[str, Any]:
    """A state: layers dealt out to stages, an embedding that the first and the last one hold."""
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    devices = tuple(tuple(of_one[:2]) for of_one in by_process.values())[:stages]
    assert len(devices) == stages

    def on(holders: Sequence[int], *spec: str | None) -> StageSharding:
        return StageSharding(devices, tuple(holders), PartitionSpec(*spec))

    random = np.random.default_rng(3)

    def layer(number: int) -> dict[str, StageArray]:
        stage = number * stages // LAYERS
        kernel, bias = (random.random(shape, np.float32) for shape in ((16, 32), (32,)))
        return {
            "kernel": _made(kernel, on([stage], None, "x")),
            "bias": _made(bias, on([stage], "x")),
        }

    params = {
        "layers": [layer(number) for number in range(LAYERS)],
        "embed": _made(random.random((8, 16), np.float32), on(sorted({0, stages - 1}), "x")),
    }
    zeros = jax.tree.map(lambda x: _made(np.zeros(x.shape, x.dtype), x.sharding), params)
    everywhere = on(range(stages))
    return {"params": params, "momentum": zeros, "count": _made(np.int32(0)[...], everywhere)}


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _updated(value: jax.Array, momentum: jax.Array) -> tuple[jax.Array, jax.Array]:
    momentum = 0.9 * momentum + jnp.sin(value)
    return value - 0.1 * momentum, momentum


@jax.jit
def _counted(count: jax.Array) -> jax.Array:
    return count + 1


def _step(state: dict[str, Any]) -> dict[str, Any]:
    """A step of training, each stage for itself; donates the state."""

    def update(value: StageArray, momentum: StageArray) -> tuple[StageArray, StageArray]:
        pairs = [_updated(*both) for both in zip(value.arrays, momentum.arrays, strict=True)]
        return tuple(  # type: ignore[return-value] # two
            StageArray([pair[i] for pair in pairs], value.sharding, value.shape, value.dtype)
            for i in (0, 1)
        )

    both = jax.tree.map(update, state["params"], state["momentum"])
    params, momentum = jax.tree.transpose(
        jax.tree.structure(state["params"]), jax.tree.structure((0, 0)), both
    )
    count = state["count"]
    counted = [_counted(array) for array in count.arrays]
    count = StageArray(counted, count.sharding, count.shape, count.dtype)
    return {"params": params, "momentum": momentum, "count": count}


def _digests(state: dict[str, Any]) -> dict[str, str]:
    """Of each shard that this process holds, what its bits are: by leaf and index."""
    return {
        f"{jax.tree_util.keystr(path)}{shard.index}": hashlib.sha256(
            np.asarray(shard.data).tobytes()
        ).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        for array in leaf.arrays
        for shard in array.addressable_shards
    }


def train_stages(directory: Path, stages: int, *, has_callback: bool) -> list[dict[str, str]]:
    """Four steps, of which the second is saved while its state is donated to the third.

    Returns:
      What the third and the fourth step made of it.
    """
    _register_once()
    state = _step(_step(_initial(stages)))
    if has_callback:
        state = one_step(_callback(directory), state, _step, step=2)
    else:
        saved = fp.save_async(directory / "2", state, options=QUICK)
        state = _step(state)
        saved.result()
        fp.finalize(directory / "2")
    third = _digests(state)
    return [third, _digests(_step(state))]


def resume_stages(directory: Path, step: int, stages: int, *, has_callback: bool) -> dict[str, str]:
    """What the next step makes of a state that any stages saved; it is saved, too."""
    _register_once()
    target = _initial(stages)
    if has_callback:
        restored = _callback(directory).restore(target, which=step)
        assert restored is not None
        state = _step(restored[0])
    else:
        state = _step(fp.load(directory / str(step), target))
    fp.save(directory / str(step + 1), state, options=QUICK)
    fp.finalize(directory / str(step + 1))
    return _digests(state)


def _callback(directory: Path) -> PartialCheckpointCallback:
    return PartialCheckpointCallback(
        directory, finalizer=FinalizeHook(timeout_secs=20), options=QUICK
    )


@functools.cache
def _register_once() -> None:
    register()
