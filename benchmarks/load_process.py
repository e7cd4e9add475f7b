"""Writing and reading on several virtual devices, for the scenario `load`.

Run as `python -m benchmarks.load_process write OURS ORBAX COUNT SIZE` to write so many arrays of so
many bytes to two paths, by us and by Orbax; and as `... load ours|orbax PATH COUNT SIZE` to read
one. Prints what it measured, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp
from benchmarks.memory_use import peak_growth

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Metrics

DEVICES = 8


def shape_of(size: int) -> tuple[int, int]:
    """Returns the shape of a float32 array of so many bytes."""
    return size // 4096, 1024


def load(reader: str, path: Path, target: Any, *, partial: bool = False) -> Any:
    """Reads what `target` names, by `fp.load` or by Orbax, each leaf onto its devices."""
    if reader == "ours":
        return jax.block_until_ready(fp.load(path, target, partial=partial))
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        return jax.block_until_ready(ocp.load(path, target))


def write(writer: str, path: Path, state: Any) -> None:
    """Writes a whole tree at once, by us or by Orbax."""
    if writer == "orbax":
        ocp.save(path, state)
        return
    fp.save(path, state)
    fp.finalize(path)


def timed(work: Callable[[], object]) -> Metrics:
    """Returns how long `work` takes in seconds; what it returns is dropped after that."""
    start = time.perf_counter()
    kept = work()
    total = time.perf_counter() - start
    del kept
    return {"total": total}


def _target(count: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    leaf = jax.ShapeDtypeStruct(shape_of(size), np.float32, sharding=sharding)
    return {f"array_{number}": leaf for number in range(count)}


def _state(count: int, size: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    return {
        name: jax.device_put(random.random(leaf.shape, np.float32), leaf.sharding)
        for name, leaf in _target(count, size).items()
    }


def _measure(reader: str, path: Path, count: int, size: int) -> Metrics:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        warm = Path(directory) / "warm"
        write(reader, warm, _state(2, DEVICES * 4096))
        load(reader, warm, _target(2, DEVICES * 4096))
    target = _target(count, size)
    with peak_growth() as growth:
        metrics = timed(lambda: load(reader, path, target))
    return metrics | {"memory": growth.bytes}


def main() -> None:
    """Does what the command line says."""
    verb, first, second, *numbers = sys.argv[1:]
    count, size = map(int, numbers)
    metrics: Metrics = {}
    if verb == "write":
        state = _state(count, size)
        write("ours", Path(first), state)
        write("orbax", Path(second), state)
    else:
        metrics = _measure(first, Path(second), count, size)
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
