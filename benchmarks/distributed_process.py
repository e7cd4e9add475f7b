"""One of the processes of the scenario `distributed`; prints what it measured, as JSON.

Run as `python -m benchmarks.distributed_process INDEX COUNT PORT WAY GROUPS SIZE PATH`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp
from benchmarks.memory_use import peak_growth

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Metrics

Group = dict[str, dict[str, jax.Array]]


def shape_of(size: int) -> tuple[int, int]:
    """Returns the shape of a float32 array of so many bytes."""
    return size // 4096, 1024


def values_of(number: int, size: int) -> np.ndarray[Any, Any]:
    """Returns what a group holds, the same in every process."""
    return np.random.default_rng(number).random(shape_of(size), np.float32)


def own_groups(count: int, size: int) -> list[Group]:
    """Returns this process's share of the groups, whole, on one of its own devices."""
    device = jax.local_devices()[0]
    mine = range(jax.process_index(), count, jax.process_count())
    return [_group(n, jax.device_put(values_of(n, size), device)) for n in mine]


def shared_groups(count: int, size: int) -> list[Group]:
    """Returns all groups, each of them spread over the devices of all processes."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    made = []
    for number in range(count):
        values = values_of(number, size)
        array = jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
        made.append(_group(number, array))
    return made


def _group(number: int, array: jax.Array) -> Group:
    return {f"group_{number}": {"kernel": array.block_until_ready()}}


def _save_ours(groups: list[Group], path: str) -> Metrics:
    begun = time.perf_counter()
    handles = [fp.save_async(path, group) for group in groups]
    blocked = time.perf_counter()
    for handle in handles:
        handle.result()
    return _finalized(begun, blocked, lambda: fp.finalize(path))


def _save_orbax_partial(groups: list[Group], path: str) -> Metrics:
    """Saves one group after the other: with two in flight, Orbax loses one."""
    import orbax.checkpoint.experimental.v1 as ocp

    begun = time.perf_counter()
    for group in groups:
        ocp.partial.save(path, group)
    return _finalized(begun, time.perf_counter(), lambda: ocp.partial.finalize(path))


def _save_orbax_whole(groups: list[Group], path: str) -> Metrics:
    import orbax.checkpoint.experimental.v1 as ocp

    begun = time.perf_counter()
    response = ocp.save_async(path, {name: group[name] for group in groups for name in group})
    return _finalized(begun, time.perf_counter(), response.result)


def _finalized(begun: float, blocked: float, finalize: Callable[[], object]) -> Metrics:
    saved = time.perf_counter()
    finalize()
    ended = time.perf_counter()
    return {"blocked": blocked - begun, "finalize": ended - saved, "total": ended - begun}


_WAYS: dict[str, tuple[Callable[..., list[Group]], Callable[..., Metrics]]] = {
    "ours_mpmd": (own_groups, _save_ours),
    "ours_spmd": (shared_groups, _save_ours),
    "orbax_partial_spmd": (shared_groups, _save_orbax_partial),
    "orbax_whole_spmd": (shared_groups, _save_orbax_whole),
}


def main() -> None:
    """Saves twice, the first time to warm up; prints what the second took."""
    index, count, port = map(int, sys.argv[1:4])
    way, groups, size, path = sys.argv[4], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7]
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index, coordinator_bind_address=address)
    make, save = _WAYS[way]
    save(make(count, 8 * 4096), f"{path}.warm_up")
    made = make(groups, size)
    with peak_growth() as growth:
        multihost_utils.sync_global_devices("ready")
        metrics = save(made, path)
        multihost_utils.sync_global_devices("done")
    print(json.dumps(metrics | {"memory": growth.bytes}))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
