"""`distributed`: four processes save together, as stages of their own (MPMD) and as one (SPMD).

Orbax's partial saving refuses arrays that are one process's own where there are several, so of the
two layouts it can do the second only. Every contender starts its processes anew; what is measured
begins when all of them are ready, and ends when the last of them has done its work.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import child
from benchmarks import contenders as by
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target
from benchmarks.memory_use import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_MIB = 1 << 20
_OURS_MPMD, _OURS_SPMD = "flax_partial, MPMD", "flax_partial, SPMD"
_PARTIAL_SPMD, _WHOLE_SPMD = "Orbax v1.partial, SPMD", "Orbax v1, one whole save, SPMD"


def build(*, small: bool) -> Scenario:
    """Returns the scenario: 4 processes, 16 groups of 16 MiB (small: 2, with 4 of 256 KiB)."""
    processes, groups, size = (2, 4, _MIB // 4) if small else (4, 16, 16 * _MIB)
    run = partial(_run, processes, groups, size)
    return Scenario(
        name="distributed",
        work=(
            f"{processes} processes of 2 devices save {groups} groups of {size // 1024:,} KiB "
            "float32 between them in the background, then finalize"
        ),
        contenders=tuple(
            Contender(name, partial(run, name), partial(_check, groups, size)) for name in _WAYS
        ),
        targets=(
            Target.faster(_OURS_SPMD, than=_PARTIAL_SPMD),
            Target.faster(_OURS_SPMD, than=_PARTIAL_SPMD, metric="blocked"),
            Target.faster(_OURS_SPMD, than=_WHOLE_SPMD),
            Target.faster(_OURS_SPMD, than=_WHOLE_SPMD, metric="blocked"),
            Target.within(Figure(_OURS_MPMD), of=Figure(_OURS_SPMD), at_most=1.2),
        ),
        touched_bytes=2 * groups * size,
    )


def _run(processes: int, groups: int, size: int, way: str, path: Path) -> Metrics:
    """Starts the processes; the slowest counts.

    Returns:
      `blocked`: for how long the saves held their callers, `finalize` where there is one,
      and `total`, in seconds. `memory`: as the process that took most of it, in bytes.
    """
    port = _free_port()
    calls = [(i, processes, port, way, groups, size, path) for i in range(processes)]
    each = child.run_together(measure, calls, devices=2)
    return {name: max(metrics[name] for metrics in each) for name in each[0]}


def _check(groups: int, size: int, path: Path) -> None:
    """Loads what the processes saved, in this one, and compares."""
    target = {
        f"group_{number}": {"kernel": np.empty(by.shape_of(size), np.float32)}
        for number in range(groups)
    }
    loaded = fp.load(path, target)
    for number in range(groups):
        expected = _values(number, size)
        np.testing.assert_array_equal(loaded[f"group_{number}"]["kernel"], expected)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# What follows runs in each of the processes.


def measure(  # noqa: PLR0917 - a process is started with a list
    index: int, count: int, port: int, way: str, groups: int, size: int, path: str
) -> Metrics:
    """Saves twice as process `index` of `count`, the first time to warm up.

    Returns:
      What the second time took: as `timed_async` says, and `memory`, in bytes.
    """
    from jax.experimental import multihost_utils

    address = f"127.0.0.1:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index, coordinator_bind_address=address)
    make, save = _WAYS[way]
    save(make(count, 8 * 4096), f"{path}.warm_up")
    made = make(groups, size)

    def timed() -> Metrics:
        multihost_utils.sync_global_devices("ready")
        metrics = save(made, path)
        multihost_utils.sync_global_devices("done")
        return metrics

    metrics = measured(timed)
    jax.distributed.shutdown()
    return metrics


def _values(number: int, size: int) -> np.ndarray[Any, Any]:
    """What a group holds, the same in every process."""
    return np.random.default_rng(number).random(by.shape_of(size), np.float32)


def _own_groups(count: int, size: int) -> list[by.Group]:
    """This process's share of the groups, whole, on one of its own devices."""
    device = jax.local_devices()[0]
    mine = range(jax.process_index(), count, jax.process_count())
    return [_group(n, jax.device_put(_values(n, size), device)) for n in mine]


def _shared_groups(count: int, size: int) -> list[by.Group]:
    """All groups, each of them spread over the devices of all processes."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    made = []
    for number in range(count):
        values = _values(number, size)
        array = jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
        made.append(_group(number, array))
    return made


def _group(number: int, array: jax.Array) -> by.Group:
    return {f"group_{number}": {"kernel": array.block_until_ready()}}


def _save_orbax_partial(groups: Sequence[by.Group], path: str) -> Metrics:
    """Saves one group after the other: with two in flight, Orbax loses one."""

    def save() -> list[Any]:
        for group in groups:
            ocp.partial.save(path, group)
        return []

    return by.timed_async(save, lambda: ocp.partial.finalize(path))


_WAYS: dict[str, tuple[Callable[[int, int], list[by.Group]], Callable[..., Metrics]]] = {
    _OURS_MPMD: (_own_groups, by.save_ours_async),
    _OURS_SPMD: (_shared_groups, by.save_ours_async),
    _PARTIAL_SPMD: (_shared_groups, _save_orbax_partial),
    _WHOLE_SPMD: (_shared_groups, by.save_orbax_whole_async),
}
