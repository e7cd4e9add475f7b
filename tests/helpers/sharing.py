"""What processes of `cluster` do with arrays that several of them hold replicas of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from spread import as_computed, assert_loaded, donated, sharded, spread
from things import counted, one_step, targets

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

SHARED = fp.SaveOptions(durable=False, chunk_bytes=64 << 10, share_replicas=True)
P = PartitionSpec
_SMALL = {f"small_{i}": ((64,), P()) for i in range(40)}
_LARGE = {
    "kernel": ((512, 384), P()),
    "embed": ((5003, 96), P()),  # of a prime number of rows
    "wide": ((3, 60_000), P()),
}
_HALVES = {
    "kernel": ((512, 384), P(None, "model")),
    "embed": ((5004, 96), P("model")),
    "both": ((640, 256), P("data", "model")),
}
# Mesh over "data" and "model", with two devices in each of four processes; arrays.
LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, tuple[tuple[int, ...], PartitionSpec]]]] = {
    "replicated": ((8, 1), _LARGE | _SMALL),
    "data x model": ((4, 2), _HALVES),
    "data x model over processes": ((2, 4), _HALVES),
    "even": ((4, 2), {"w": ((4096, 256), P()), "v": ((2048, 512), P(None, "model"))}),
    "mixed": ((4, 2), {f"{name}_": array for name, array in _HALVES.items()} | _LARGE | _SMALL),
}


def values(layout: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(21)
    shapes = {name: shape for name, (shape, _) in LAYOUTS[layout][1].items()}
    return {name: random.random(shape, np.float32) for name, shape in shapes.items()}


def _shardings(layout: str, mesh_shape: Sequence[int]) -> dict[str, NamedSharding]:
    devices = np.array(jax.devices()[: math.prod(mesh_shape)]).reshape(mesh_shape)
    specs = {name: spec for name, (_, spec) in LAYOUTS[layout][1].items()}
    return sharded(Mesh(devices, ("data", "model")), specs)


def _arrays(layout: str) -> dict[str, jax.Array]:
    arrays: dict[str, jax.Array] = as_computed(
        spread(values(layout), _shardings(layout, LAYOUTS[layout][0]))
    )
    return arrays


def save_shared(
    path: Path, layout: str, *, is_async: bool = False, only: Sequence[str] = (), **options: Any
) -> int:
    """Saves arrays of a layout, some of them only; returns how many bytes this process wrote."""
    arrays = {name: array for name, array in _arrays(layout).items() if not only or name in only}
    options = {"options": SHARED} | options
    if not is_async:
        return fp.save(path, arrays, **options).bytes
    handle = fp.save_async(path, arrays, **options)
    jax.block_until_ready(donated(arrays))
    return handle.result().bytes


def load_shared(path: Path, layout: str, mesh_shape: Sequence[int], **how: Any) -> int:
    """Loads onto a mesh of this job, and compares; returns how many bytes this process has read."""
    shardings, wanted = _shardings(layout, mesh_shape), values(layout)
    loaded, read = counted(lambda: fp.load(path, targets(wanted, shardings), **how))
    assert_loaded(loaded, shardings, wanted)
    return read


def train_shared(directory: Path, layout: str, **options: Any) -> tuple[int, tuple[str, ...]]:
    """A step with the callback, whose state is donated; the bytes and groups of this process."""
    callback = PartialCheckpointCallback(
        directory,
        finalizer=FinalizeHook(timeout_secs=20),
        **{"options": fp.SaveOptions(durable=False), **options},
    )
    one_step(callback, {"params": _arrays(layout)}, lambda x: jax.block_until_ready(donated(x)))
    (report,) = callback.reports
    return sum(save.bytes for save in report.saves.values()), report.groups
