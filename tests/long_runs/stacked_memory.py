"""Run by test_stacked_memory: how much host memory one saved step takes, in a process of its own.

Prints megabytes of the state, and by how many the process's peak grew from before the saved step
until two steps later: where it was saved in rows, one stage of one repeat at a time, and whole.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import types
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

REPEATS, STAGES, WIDTH = 8, 8, 1 << 19
LAYER_BYTES = 4 * WIDTH
BUDGET = 4 * LAYER_BYTES


@functools.partial(jax.jit, donate_argnums=0)
def step(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: x + np.float32(1), params)


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def new_params(shape: tuple[int, ...], *spec: str | None) -> dict[str, dict[str, jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("stage",))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    ones = jax.jit(lambda: jnp.ones((*shape, WIDTH)), out_shardings=sharding)
    return {"layers": {"w": ones()}}


def grown_bytes(
    directory: Path,
    params: dict[str, dict[str, jax.Array]],
    stacked: dict[str, int | tuple[int, ...]] | None,
) -> int:
    """Trains four steps, of which the second is saved."""
    callback = PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        every_n_train_steps=2,
        stacked=stacked,
        options=fp.SaveOptions(max_inflight_bytes=BUDGET),
    )
    trainer = types.SimpleNamespace(
        global_step=0, current_epoch=0, callback_metrics={}, is_last_batch=False, state=None
    )
    callback.on_fit_start(trainer, None)
    before = 0
    for number in range(1, 5):
        if number == 2:  # everything is compiled, and all memory of a step touched
            jax.block_until_ready(params)
            reset_peak()
            before = peak_bytes()
        params = step(params)
        trainer.global_step, trainer.state = number, {"params": params}
        if number < 4:
            callback.on_train_batch_end(trainer, None, None, None, number)
    jax.block_until_ready(params)
    callback.on_train_end(trainer, None)
    grown = peak_bytes() - before
    loaded = fp.load(directory / "2", target={"params": params})["params"]["layers"]["w"]
    assert (loaded == 3).all()
    return grown


def main(directory: str) -> None:
    layers, cells = (REPEATS * STAGES,), (REPEATS, STAGES)
    by_row, by_cell = {"params.layers": 0}, {"params.layers": (0, 1)}
    found = (
        REPEATS * STAGES * LAYER_BYTES,
        grown_bytes(Path(directory, "rows"), new_params(layers, "stage"), by_row),
        grown_bytes(Path(directory, "cells"), new_params(cells, None, "stage"), by_cell),
        grown_bytes(Path(directory, "whole"), new_params(layers, "stage"), None),
    )
    sys.stdout.write(" ".join(f"{size / 1e6:.0f}" for size in found))


if __name__ == "__main__":
    main(sys.argv[1])
