"""What a process of `cluster` runs: the functions below, as it is told, one after another.

Run as `cluster_worker.py INDEX COUNT ADDRESS BIND`, the last two being where JAX's coordination
service is, and where process 0 has its own; "none" stands for no `jax.distributed`. Calls come on
standard input and answers go to standard output, pickled; what is printed goes to standard error.
"""

from __future__ import annotations

import os
import pickle
import resource
import sys
import threading
import time
import types
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

QUICK = fp.SaveOptions(durable=False, chunk_bytes=32 << 10)
WIDTH = 384
_handles: dict[str, Future[Any]] = {}


def ready() -> int:
    return jax.process_index()


# Stages: each process has layers of its own, as arrays on its own devices.


def layer(number: int) -> dict[str, np.ndarray]:
    """The parameters of a layer, the same wherever they are asked for."""
    random = np.random.default_rng(number)
    return {
        "kernel": random.random((WIDTH, WIDTH), np.float32),
        "bias": random.random(WIDTH, np.float32),
    }


@jax.jit
def _as_computed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x + 0, tree)


def stage_state(numbers: Iterable[int], count: int | None) -> dict[str, Any]:
    """The state of a stage: its layers under their global names, and a step count."""
    tree = {str(number): layer(number) for number in numbers}
    device = jax.local_devices()[-1]
    blocks = {name: _as_computed(jax.device_put(one, device)) for name, one in tree.items()}
    return {"params": {"blocks": blocks}, "opt_state": {"count": jnp.int32(count or 0)}}


def save_stage(
    path: str, numbers: Sequence[int], *, count: int | None = 7, **options: Any
) -> list[str]:
    """Saves layers one by one, the last first, as a backward pass would; names of the parts."""
    parts = []
    for number in reversed(numbers):
        state = stage_state([number], count)
        is_first = number == numbers[-1] and count is not None
        part = state if is_first else {"params": state["params"]}
        parts.append(fp.save(path, part, options=QUICK, **options).part)
    return parts


def save_stage_async(path: str, numbers: Sequence[int]) -> None:
    """Like `save_stage`, in the background, donating what was handed over at once."""
    donate = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    for number in numbers:
        state = stage_state([number], 7)
        fp.save_async(path, {"params": state["params"]}, options=QUICK)
        jax.block_until_ready(donate(state["params"]))


def load_stage(path: str, numbers: Sequence[int]) -> int:
    """Loads only these layers, onto this process's devices; returns how many bytes were read."""
    mesh = Mesh(np.array(jax.local_devices()), ("x",))
    kernel = NamedSharding(mesh, PartitionSpec("x"))
    target = {
        "params": {
            "blocks": {
                str(number): {
                    "kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=kernel),
                    "bias": jax.ShapeDtypeStruct((WIDTH,), jnp.float32),
                }
                for number in numbers
            }
        },
        "opt_state": {"count": jax.ShapeDtypeStruct((), jnp.int32)},
    }
    state, bytes_read = _counted(lambda: fp.load(path, target, partial=True))
    for number in numbers:
        loaded, wanted = state["params"]["blocks"][str(number)], layer(number)
        assert loaded["kernel"].sharding == kernel
        assert loaded.keys() == wanted.keys()
        assert all(np.array_equal(loaded[name], wanted[name]) for name in wanted)
    assert int(state["opt_state"]["count"]) == 7
    return bytes_read


# Global arrays: all processes have a share in each.


def global_values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    names = ("both", "first", "second", "swapped", "joined", "nowhere")
    return {name: random.random((16, 8, 64), np.float32) for name in names}


def specs() -> dict[str, PartitionSpec]:
    """Every way of sharding over two mesh axes, and replicating over the others."""
    return {
        "both": PartitionSpec("x", "y"),
        "first": PartitionSpec("x"),
        "second": PartitionSpec(None, "y"),
        "swapped": PartitionSpec("y", None, "x"),
        "joined": PartitionSpec(("x", "y")),
        "nowhere": PartitionSpec(),
    }


def global_mesh(shape: Sequence[int], *, is_reversed: bool = False) -> Mesh:
    devices = jax.devices()[::-1] if is_reversed else jax.devices()
    return Mesh(np.array(devices).reshape(shape), ("x", "y"))


def global_arrays(shape: Sequence[int]) -> dict[str, jax.Array]:
    mesh = global_mesh(shape)
    made = {
        name: jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, specs()[name]), value.__getitem__
        )
        for name, value in global_values().items()
    }
    return {name: _as_computed(array) for name, array in made.items()}


def save_global(path: str, shape: Sequence[int], *, is_stale: bool = False, **options: Any) -> str:
    """Saves all of them; stale ones have other values."""
    arrays = global_arrays(shape)
    if is_stale:
        arrays = {name: array + 1 for name, array in arrays.items()}
    return fp.save(path, arrays, options=QUICK, **options).part


def frozen_value() -> np.ndarray:
    return np.random.default_rng(6).random((512, 512), np.float32)


def save_frozen(path: str, shape: Sequence[int], **options: Any) -> int:
    """Saves an array that never changes, and one that does; returns how much was not written."""
    frozen, sharding = frozen_value(), NamedSharding(global_mesh(shape), PartitionSpec("x", "y"))
    array = jax.make_array_from_callback(frozen.shape, sharding, frozen.__getitem__)
    state = {"frozen": array, "changes": np.random.default_rng().random(20_000)}
    if jax.process_index():
        del state["changes"]
    return fp.save(path, state, options=QUICK, **options).reused_bytes


def save_global_async(path: str, shape: Sequence[int]) -> None:
    """Saves in the background, and donates what was handed over at once."""
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    state = global_arrays(shape)
    fp.save_async(path, state, options=QUICK)
    jax.block_until_ready(donate(state))


def load_global(path: str, shape: Sequence[int], *, is_reversed: bool = False) -> int:
    """Loads onto another mesh and compares this process's shards; returns the bytes it read."""
    mesh = global_mesh(shape, is_reversed=is_reversed)
    values = global_values()
    target = {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, specs()[name])
        )
        for name, value in values.items()
    }
    loaded, bytes_read = _counted(lambda: fp.load(path, target))
    for name, array in loaded.items():
        assert array.sharding == target[name].sharding
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, values[name][shard.index])
    return bytes_read


def load_by_orbax(path: str) -> None:
    """Loads by Orbax, which finds the shardings in the checkpoint."""
    import orbax.checkpoint.experimental.v1 as ocp

    for name, array in ocp.load(path).items():
        assert array.sharding.spec == specs()[name]
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, global_values()[name][shard.index])


# Stacked leaves: all layers in one array, which all processes have a share in, or each some rows.

REPEATS, STAGES, LAYERS = 3, 4, 8
STACKED: dict[str, int | tuple[int, ...]] = {"params.layers": 0, "params.pipeline": (0, 1)}
LAYOUTS = {
    "rows by process": {"layers": PartitionSpec("x"), "pipeline": PartitionSpec(None, "x")},
    "and rows sharded": {
        "layers": PartitionSpec("x", None, "y"),
        "pipeline": PartitionSpec(None, "x", "y"),
    },
    "rows over all": {
        "layers": PartitionSpec(None, ("x", "y")),
        "pipeline": PartitionSpec(None, None, "y", "x"),
    },
    "all rows in the first": {"layers": PartitionSpec(), "pipeline": PartitionSpec()},
}


def stacked_values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(11)
    return {
        "layers": random.random((LAYERS, 16, 64), np.float32),
        "pipeline": random.random((REPEATS, STAGES, 8, 32), np.float32),
    }


def stacked_arrays(layout: str, shape: Sequence[int]) -> dict[str, jax.Array]:
    mesh = global_mesh(shape)
    return {
        name: jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, LAYOUTS[layout][name]), value.__getitem__
        )
        for name, value in stacked_values().items()
    }


def train_stacked(
    directory: str, layout: str, shape: Sequence[int], *, budget: int | None = None
) -> tuple[str, ...]:
    """A step whose state is saved by rows, while it is computed, and donated after that.

    Returns:
      The groups that this process saved.
    """
    callback = PartialCheckpointCallback(
        directory,
        stacked=STACKED,
        finalizer=FinalizeHook(timeout_secs=20),
        options=fp.SaveOptions(durable=False, max_inflight_bytes=budget),
    )
    state = {"params": _as_computed(stacked_arrays(layout, shape))}
    trainer = types.SimpleNamespace(
        global_step=0, current_epoch=0, callback_metrics={}, is_last_batch=True, state=state
    )
    callback.on_fit_start(trainer, None)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, None, None, None, 0)
    trainer.state = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(
        state
    )
    callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    return callback.reports[0].groups


def load_stacked(path: str, layout: str, shape: Sequence[int]) -> None:
    """Loads onto this job's devices, and compares this process's shards."""
    values, mesh = stacked_values(), global_mesh(shape)
    target = {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, LAYOUTS[layout][name])
        )
        for name, value in values.items()
    }
    for name, array in fp.load(path, {"params": target}, partial=True)["params"].items():
        assert array.sharding == target[name].sharding
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, values[name][shard.index])


def load_stacked_by_orbax(path: str, layout: str) -> None:
    """Loads by Orbax, which finds the shardings in the checkpoint."""
    import orbax.checkpoint.experimental.v1 as ocp

    for name, array in ocp.load(path)["params"].items():
        assert array.sharding.spec == LAYOUTS[layout][name]
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, stacked_values()[name][shard.index])


def save_stacked_slices(path: str, layout: str, shape: Sequence[int]) -> None:
    """Saves pieces that all processes share, each process in an order of its own."""
    arrays = stacked_arrays(layout, shape)
    pieces: list[dict[str, fp.Slice]] = [
        {"layers": fp.Slice(arrays["layers"][at : at + 2], at, LAYERS)}
        for at in range(0, LAYERS, 2)
    ]
    pieces += [
        {"pipeline": fp.Slice(arrays["pipeline"][at : at + 1], (at, 0), (REPEATS, STAGES), (0, 1))}
        for at in range(REPEATS)
    ]
    turn = jax.process_index()
    for piece in pieces[turn:] + pieces[:turn]:
        fp.save(path, {"params": piece}, options=QUICK)


def save_own_slices(path: str, layers: Sequence[int], stages: Sequence[int]) -> None:
    """Saves rows that this process alone has, on its own devices: no two have as many."""
    values = jax.device_put(stacked_values(), jax.local_devices()[-1])
    for stage in stages:
        for repeat in range(REPEATS):
            cell = values["pipeline"][repeat : repeat + 1, stage : stage + 1]
            piece = fp.Slice(cell, (repeat, stage), (REPEATS, STAGES), (0, 1))
            fp.save(path, {"params": {"pipeline": piece}}, options=QUICK)
    if layers:
        rows = values["layers"][layers[0] : layers[-1] + 1]
        fp.save(path, {"params": {"layers": fp.Slice(rows, layers[0], LAYERS)}}, options=QUICK)


def save_keys(path: str) -> None:
    """Saves PRNG keys that all processes share, and a global array of them."""
    mesh = global_mesh((jax.device_count(), 1))
    fp.save(path, {"one": jax.random.key(3), "many": _global_keys(mesh)}, options=QUICK)


def load_keys(path: str) -> None:
    keys = _global_keys(global_mesh((1, jax.device_count())))
    many = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=keys.sharding)
    loaded = fp.load(path, {"one": jax.random.key(0), "many": many})
    for got, want in zip(
        jax.random.key_data(loaded["many"]).addressable_shards,
        jax.random.key_data(keys).addressable_shards,
        strict=True,
    ):
        assert np.array_equal(got.data, want.data)
    one, other = map(jax.random.key_data, (loaded["one"], jax.random.key(3)))
    assert np.array_equal(one, other)


def _global_keys(mesh: Mesh) -> jax.Array:
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    make = jax.jit(lambda: jax.random.split(jax.random.key(9), 8), out_shardings=sharding)
    keys: jax.Array = make()
    return keys


# Anything else.


def _of_each_process() -> dict[str, jax.Array]:
    """An array for each process, on its devices alone, as frameworks for MPMD hand them to all."""
    arrays = {}
    for process in range(jax.process_count()):
        devices = [device for device in jax.devices() if device.process_index == process]
        sharding = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
        value = np.arange(8.0, dtype=np.float32) + 100 * process
        shards = [
            jax.device_put(value[index], device)
            for device, index in sharding.addressable_devices_indices_map(value.shape).items()
        ]
        arrays[f"stage{process}"] = jax.make_array_from_single_device_arrays(
            value.shape, sharding, shards, dtype=value.dtype
        )
    return arrays


def save_of_each_process(path: str, **options: Any) -> int:
    """Saves the whole tree, of which this process holds one array; returns the bytes written."""
    state = {"step": 3, **_of_each_process()} if jax.process_index() == 0 else _of_each_process()
    handle = fp.save_async(path, state, **options)
    return handle.result().bytes


def load_of_each_process(path: str) -> list[int]:
    """Loads the whole tree onto the shardings; returns the number of shards of each array here."""
    target = {"step": 0, **_of_each_process()}
    loaded = fp.load(path, target)
    for process, (name, wanted) in enumerate(_of_each_process().items()):
        assert loaded[name].sharding == wanted.sharding
        for shard in loaded[name].addressable_shards:
            value = np.arange(8.0, dtype=np.float32)[shard.index] + 100 * process
            np.testing.assert_array_equal(shard.data, value)
    return [len(loaded[name].addressable_shards) for name in target if name != "step"]


def save(path: str, state: Any, **options: Any) -> str:
    return fp.save(path, state, options=QUICK, **options).part


def finalize(path: str, **options: Any) -> list[str]:
    return sorted(fp.finalize(path, **options).leaves)


def begin_finalize(path: str, **options: Any) -> None:
    _handles[path] = fp.finalize_async(path, **options)


def end_finalize(path: str) -> list[str]:
    return sorted(_handles.pop(path).result(50).leaves)


def is_finalized(path: str) -> bool:
    return _handles[path].done()


def finalize_in_threads(paths: Sequence[str]) -> list[list[str]]:
    """Finalizes several checkpoints, each in a thread of its own."""
    leaves: dict[str, list[str]] = {}
    threads = [
        threading.Thread(target=lambda path=path: leaves.update({path: finalize(path)}))
        for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    return [leaves[path] for path in paths]


def train(steps: int) -> float:
    """Steps with collectives over all devices, which nothing else may come between."""
    sharding = NamedSharding(global_mesh((jax.device_count(), 1)), PartitionSpec("x"))
    x = jax.jit(lambda: jnp.ones((jax.device_count(), 64)), out_shardings=sharding)()
    step = jax.jit(lambda x: x + jnp.sum(x) / x.size, donate_argnums=0)
    for _ in range(steps):
        x = jax.block_until_ready(step(x))
    return float(np.asarray(x.addressable_shards[0].data)[0, 0])


def save_past_the_limit(path: str) -> None:
    """A save in the background that fails: this process may write no more than 4 KiB to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        handle = fp.save_async(path, {"large": np.zeros(1 << 20)}, options=QUICK)
        while not handle.done():
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_loop(
    directory: str, steps: int, *, failing_step: int = 0, pause_secs: float = 0.0
) -> tuple[int, list[int]]:
    """Trains with the callback; returns what it restored, and the steps that it finalized.

    With a pause, the failing step goes on to its next layer after a save of it has failed.
    """
    callback = PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        every_n_train_steps=1,
        keep_last=2,
        state_fn=lambda trainer, _: {"progress": {"step": trainer.global_step}},
        finalizer=FinalizeHook(timeout_secs=20),
        options=QUICK,
    )
    trainer = types.SimpleNamespace(
        global_step=0, current_epoch=0, callback_metrics={"loss": 0.5}, is_last_batch=False
    )
    callback.setup(trainer, None, "fit")
    try:
        callback.on_fit_start(trainer, None)
        restored = callback.restore({"progress": {"step": 0}})
        trainer.global_step = restored[1] if restored else 0
        callback.on_train_start(trainer, None)
        for step in range(trainer.global_step + 1, steps + 1):
            callback.on_train_batch_start(trainer, None, None, step)
            own = {"w": np.full(1 << 16, step, np.float32)}
            if step == failing_step:
                callback.finalizer.wait()  # the step before is to succeed
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            callback.on_layer_ready(trainer, f"layer{jax.process_index()}", own)
            if pause_secs and step == failing_step:
                time.sleep(pause_secs)
                callback.on_layer_ready(trainer, "last", own)
            trainer.global_step = step
            callback.on_train_batch_end(trainer, None, None, None, step)
        callback.on_train_end(trainer, None)
    except Exception as error:
        callback.on_exception(trainer, None, error)
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return restored[1] if restored else 0, [report.step for report in callback.reports]


def train_until_told(directory: str, pause_secs: float, **options: Any) -> tuple[int, list[int]]:
    """Trains at a pace of its own until told to stop; its last step, and those it finalized.

    Unless told it ends after `most_steps`.
    """
    most_steps = options.pop("most_steps", 10_000)
    if "interval_secs" in options:
        options["train_time_interval"] = timedelta(seconds=options.pop("interval_secs"))
    callback = PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        state_fn=lambda trainer, _: {f"of{jax.process_index()}": np.full(9, trainer.global_step)},
        finalizer=FinalizeHook(timeout_secs=20),
        options=QUICK,
        **options,
    )
    trainer = types.SimpleNamespace(
        global_step=0,
        current_epoch=0,
        callback_metrics={},
        is_last_batch=False,
        should_stop=False,
    )
    callback.on_fit_start(trainer, None)
    while not trainer.should_stop and trainer.global_step < most_steps:
        time.sleep(pause_secs)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, trainer.global_step)
    callback.on_train_end(trainer, None)
    return trainer.global_step, [report.step for report in callback.reports]


def sleep(secs: float) -> None:
    time.sleep(secs)


def _counted(load: Callable[[], Any]) -> tuple[Any, int]:
    """What `load` returns, and how many bytes it reads: the second time, when all is imported."""
    load()
    before = _bytes_read()
    return load(), _bytes_read() - before


def _bytes_read() -> int:
    """Bytes that this process has read from files so far, by the kernel's own count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def main() -> None:
    index, count = map(int, sys.argv[1:3])
    address, bind = sys.argv[3:]
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if address != "none":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index, coordinator_bind_address=bind)
    while True:
        try:
            name, arguments, options = pickle.load(calls)  # noqa: S301 - from our own test
        except EOFError:
            break
        outcome: tuple[Any, Exception | None]
        try:
            outcome = globals()[name](*arguments, **options), None
        except Exception as error:  # noqa: BLE001 - it is raised on the other side
            outcome = None, error
        pickle.dump(outcome, answers)
        answers.flush()
    if address != "none":
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
