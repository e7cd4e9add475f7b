"""What a process of `cluster` runs: the functions below, as a test calls them.

Run as `cluster_worker.py INDEX COUNT ADDRESS BIND`, the last two being where JAX's coordination
service is, and where process 0 has its own; "none" stands for no `jax.distributed`. Calls come on
standard input and answers go to standard output, pickled; what is printed goes to standard error.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from mpmd import resume_stages, train_stages  # noqa: F401 - tests have processes call these
from sharing import load_shared, save_shared, train_shared  # noqa: F401 - and these
from spread import as_computed, assert_loaded, donated, sharded, spread
from things import counted, one_step, targets, trainer

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback, checkpointing

QUICK = fp.SaveOptions(durable=False, chunk_bytes=32 << 10)
WIDTH = 384
_handles: dict[Path, Future[Any]] = {}


def ready() -> int:
    return jax.process_index()


# Stages: each process has layers of its own, as arrays on its own devices.


def layer(number: int) -> dict[str, np.ndarray]:
    """The parameters of a layer, the same wherever they are asked for."""
    numbers = np.random.default_rng(number)
    return {
        "kernel": numbers.random((WIDTH, WIDTH), np.float32),
        "bias": numbers.random(WIDTH, np.float32),
    }


def stage_state(numbers: Iterable[int], count: int | None) -> dict[str, Any]:
    """The state of a stage: its layers under their global names, and a step count."""
    tree = {str(number): layer(number) for number in numbers}
    device = jax.local_devices()[-1]
    blocks = {name: as_computed(jax.device_put(one, device)) for name, one in tree.items()}
    return {"params": {"blocks": blocks}, "opt_state": {"count": jnp.int32(count or 0)}}


def save_stage(
    path: Path, numbers: Sequence[int], *, count: int | None = 7, **options: Any
) -> list[str]:
    """Saves layers one by one, the last first, as a backward pass would; names of the parts."""
    parts = []
    for number in reversed(numbers):
        state = stage_state([number], count)
        is_first = number == numbers[-1] and count is not None
        part = state if is_first else {"params": state["params"]}
        parts.append(fp.save(path, part, options=QUICK, **options).part)
    return parts


def save_stage_async(path: Path, numbers: Sequence[int]) -> None:
    """Like `save_stage`, in the background, donating what was handed over at once."""
    for number in numbers:
        state = stage_state([number], 7)
        fp.save_async(path, {"params": state["params"]}, options=QUICK)
        jax.block_until_ready(donated(state["params"]))


def load_stage(path: Path, numbers: Sequence[int]) -> int:
    """Loads only these layers, onto this process's devices; returns how many bytes were read."""
    mesh = Mesh(np.array(jax.local_devices()), ("x",))
    kernel = NamedSharding(mesh, PartitionSpec("x"))
    block = targets(layer(0), {"kernel": kernel, "bias": None})
    target = {
        "params": {"blocks": {str(number): block for number in numbers}},
        "opt_state": {"count": jax.ShapeDtypeStruct((), jnp.int32)},
    }
    state, bytes_read = counted(lambda: fp.load(path, target, partial=True))
    for number in numbers:
        loaded, wanted = state["params"]["blocks"][str(number)], layer(number)
        assert loaded["kernel"].sharding == kernel
        jax.tree.map(np.testing.assert_array_equal, loaded, wanted)
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
    arrays: dict[str, jax.Array] = as_computed(
        spread(global_values(), sharded(global_mesh(shape), specs()))
    )
    return arrays


def save_global(path: Path, shape: Sequence[int], *, is_stale: bool = False, **options: Any) -> str:
    """Saves all of them; stale ones have other values."""
    arrays = global_arrays(shape)
    if is_stale:
        arrays = {name: array + 1 for name, array in arrays.items()}
    return fp.save(path, arrays, options=QUICK, **options).part


def frozen_value() -> np.ndarray:
    return np.random.default_rng(6).random((512, 512), np.float32)


def save_frozen(path: Path, shape: Sequence[int], **options: Any) -> int:
    """Saves an array that never changes, and one that does; returns how much was not written."""
    shardings = sharded(global_mesh(shape), {"frozen": PartitionSpec("x", "y")})
    state: dict[str, Any] = spread({"frozen": frozen_value()}, shardings)
    if not jax.process_index():
        state["changes"] = np.random.default_rng().random(20_000)
    return fp.save(path, state, options=QUICK, **options).reused_bytes


def save_global_async(path: Path, shape: Sequence[int]) -> None:
    """Saves in the background, and donates what was handed over at once."""
    state = global_arrays(shape)
    fp.save_async(path, state, options=QUICK)
    jax.block_until_ready(donated(state))


def load_global(path: Path, shape: Sequence[int], *, is_reversed: bool = False) -> int:
    """Loads onto another mesh and compares this process's shards; returns the bytes it read."""
    values = global_values()
    shardings = sharded(global_mesh(shape, is_reversed=is_reversed), specs())
    loaded, bytes_read = counted(lambda: fp.load(path, targets(values, shardings)))
    assert_loaded(loaded, shardings, values)
    return bytes_read


def load_by_orbax(path: Path, shape: Sequence[int]) -> None:
    """Loads by Orbax, which finds the shardings in the checkpoint."""
    import orbax.checkpoint.experimental.v1 as ocp

    assert_loaded(ocp.load(path), sharded(global_mesh(shape), specs()), global_values())


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
    "rows replicated": {"layers": PartitionSpec(), "pipeline": PartitionSpec()},
}


def stacked_values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(11)
    return {
        "layers": random.random((LAYERS, 16, 64), np.float32),
        "pipeline": random.random((REPEATS, STAGES, 8, 32), np.float32),
    }


def stacked_arrays(layout: str, shape: Sequence[int]) -> dict[str, jax.Array]:
    return spread(stacked_values(), sharded(global_mesh(shape), LAYOUTS[layout]))


def train_stacked(
    directory: Path, layout: str, shape: Sequence[int], *, budget: int | None = None
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
    state = {"params": as_computed(stacked_arrays(layout, shape))}
    one_step(callback, state, donated)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    return callback.reports[0].groups


def load_stacked(path: Path, layout: str, shape: Sequence[int]) -> None:
    """Loads onto this job's devices, and compares this process's shards."""
    values, shardings = stacked_values(), sharded(global_mesh(shape), LAYOUTS[layout])
    loaded = fp.load(path, {"params": targets(values, shardings)}, partial=True)["params"]
    assert_loaded(loaded, shardings, values)


def load_stacked_by_orbax(path: Path, layout: str, shape: Sequence[int]) -> None:
    """Loads by Orbax, which finds the shardings in the checkpoint."""
    import orbax.checkpoint.experimental.v1 as ocp

    shardings = sharded(global_mesh(shape), LAYOUTS[layout])
    assert_loaded(ocp.load(path)["params"], shardings, stacked_values())


def save_stacked_slices(path: Path, layout: str, shape: Sequence[int]) -> None:
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


def save_own_slices(path: Path, layers: Sequence[int], stages: Sequence[int]) -> None:
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


def restacked_values() -> np.ndarray:
    return np.random.default_rng(12).random((LAYERS, 256, 512), np.float32)


def load_restacked(path: Path) -> int:
    """Loads layers of `[layers, ...]` as `[repeats, stages, ...]`, the stages over all processes.

    Returns:
      How many bytes this process has read.
    """
    values = restacked_values().reshape(LAYERS // STAGES, STAGES, 256, 512)
    sharding = NamedSharding(global_mesh((4, 2)), PartitionSpec(None, "x", "y"))
    target = targets({"stages": values}, {"stages": sharding})
    restack = {fp.Stack("layers", 0): fp.Stack("stages", (0, 1))}
    loaded, bytes_read = counted(lambda: fp.load(path, target, restack=restack))
    assert_loaded(loaded, {"stages": sharding}, {"stages": values})
    return bytes_read


def save_keys(path: Path) -> None:
    """Saves PRNG keys that all processes share, and a global array of them."""
    many = _global_keys(global_mesh((jax.device_count(), 1)))
    fp.save(path, {"one": jax.random.key(3), "many": many}, options=QUICK)


def load_keys(path: Path) -> None:
    keys = _global_keys(global_mesh((1, jax.device_count())))
    many = targets({"many": keys}, {"many": keys.sharding})
    loaded = fp.load(path, {"one": jax.random.key(0), **many})
    for got, want in ((loaded["one"], jax.random.key(3)), (loaded["many"], keys)):
        ours, others = (jax.random.key_data(one).addressable_shards for one in (got, want))
        for shard, other in zip(ours, others, strict=True):
            assert np.array_equal(shard.data, other.data)


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


def save_on_one_device_each(path: str) -> int:
    """Saves an array for each process, on its first device alone; returns the bytes written."""
    arrays = {}
    for process in range(jax.process_count()):
        first = next(one for one in jax.devices() if one.process_index == process)
        value = np.arange(8.0, dtype=np.float32) + 100 * process
        shards = [jax.device_put(value, first)] if process == jax.process_index() else []
        arrays[f"stage{process}"] = jax.make_array_from_single_device_arrays(
            value.shape, SingleDeviceSharding(first), shards, dtype=value.dtype
        )
    return fp.save_async(path, arrays).result().bytes


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


def save(path: Path, state: Any, **options: Any) -> str:
    return fp.save(path, state, options=QUICK, **options).part


def finalize(path: Path, **options: Any) -> list[str]:
    return sorted(fp.finalize(path, **options).leaves)


def finalize_expecting(path: Path, expect: Sequence[str], **options: Any) -> list[str]:
    return finalize(path, expect=expect, **options)


def begin_finalize(path: Path, **options: Any) -> None:
    _handles[path] = fp.finalize_async(path, **options)


def end_finalize(path: Path) -> list[str]:
    return sorted(_handles.pop(path).result(250).leaves)


def is_finalized(path: Path) -> bool:
    return _handles[path].done()


def finalize_in_threads(paths: Sequence[Path]) -> list[list[str]]:
    """Finalizes several checkpoints, each in a thread of its own."""
    with ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(finalize, paths))


def train(steps: int) -> float:
    """Steps with collectives over all devices, which nothing else may come between."""
    sharding = NamedSharding(global_mesh((jax.device_count(), 1)), PartitionSpec("x"))
    x = jax.jit(lambda: jnp.ones((jax.device_count(), 64)), out_shardings=sharding)()
    step = jax.jit(lambda x: x + jnp.sum(x) / x.size, donate_argnums=0)
    for _ in range(steps):
        x = jax.block_until_ready(step(x))
    return float(np.asarray(x.addressable_shards[0].data)[0, 0])


def save_past_the_limit(path: Path) -> None:
    """A save in the background that fails: this process may write no more than 4 KiB to a file."""
    limit_files(4096)
    try:
        wait([fp.save_async(path, {"large": np.zeros(1 << 20)}, options=QUICK)])
    finally:
        limit_files()


def limit_files(size: int = resource.RLIM_INFINITY) -> None:
    """Lets no file grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run_loop(
    directory: Path, failing_step: int = 0, *, steps: int = 4, pause_secs: float = 0.0
) -> tuple[int, list[int]]:
    """Trains with the callback; returns what it restored, and the steps that it finalized.

    With a pause, the failing step goes on to its next layer after a save of it has failed.
    """
    callback = PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        every_n_train_steps=1,
        keep_last=2,
        state_fn=lambda loop, _: {"progress": {"step": loop.global_step}},
        finalizer=FinalizeHook(timeout_secs=20),
        options=QUICK,
    )
    loop = trainer(is_last_batch=False)
    callback.setup(loop, None, "fit")
    try:
        callback.on_fit_start(loop, None)
        restored = callback.restore({"progress": {"step": 0}}, partial=True)
        loop.global_step = restored[1] if restored else 0
        callback.on_train_start(loop, None)
        for step in range(loop.global_step + 1, steps + 1):
            callback.on_train_batch_start(loop, None, None, step)
            own = {"w": np.full(1 << 16, step, np.float32)}
            if step == failing_step:
                callback.finalizer.wait()  # the step before is to succeed
                limit_files(4096)
            callback.on_layer_ready(loop, f"layer{jax.process_index()}", own)
            if pause_secs and step == failing_step:
                time.sleep(pause_secs)
                callback.on_layer_ready(loop, "last", own)
            loop.global_step, loop.callback_metrics = step, {"loss": 0.5}  # of each step anew
            callback.on_train_batch_end(loop, None, None, None, step)
        callback.on_train_end(loop, None)
    except Exception as error:
        callback.on_exception(loop, None, error)
        raise
    finally:
        limit_files()
    return restored[1] if restored else 0, [report.step for report in callback.reports]


def train_until_told(directory: Path, pause_secs: float, **options: Any) -> tuple[int, list[int]]:
    """Trains at a pace of its own until told to stop; its last step, and those it finalized.

    Unless told it ends after `most_steps`. Beside the directory is a file once it has begun.
    """
    most_steps = options.pop("most_steps", 10_000)
    if "interval_secs" in options:
        options["train_time_interval"] = timedelta(seconds=options.pop("interval_secs"))
    callback = PartialCheckpointCallback(
        directory,
        every_n_epochs=None,
        state_fn=lambda loop, _: {f"of{jax.process_index()}": np.full(9, loop.global_step)},
        finalizer=FinalizeHook(timeout_secs=20),
        options=QUICK,
        **options,
    )
    loop = trainer(is_last_batch=False, should_stop=False)
    callback.on_fit_start(loop, None)
    while not loop.should_stop and loop.global_step < most_steps:
        time.sleep(pause_secs)
        loop.global_step += 1
        callback.on_train_batch_end(loop, None, None, None, loop.global_step)
        directory.with_suffix(f".{jax.process_index()}").touch()
    callback.on_train_end(loop, None)
    return loop.global_step, [report.step for report in callback.reports]


def goes_on_with_its_own_data(directory: Path) -> tuple[bool, list[int]]:
    """Whether data go on where a checkpoint was made; and the steps left after going back."""
    target = {f"of{jax.process_index()}": np.zeros(2)}
    options: Any = {"every_n_train_steps": 1, "every_n_epochs": None}
    data = random.Random(jax.process_index())  # noqa: S311
    with checkpointing(directory, extras={"data": data}, **options) as ckpt:
        for _ in range(3):
            data.random()
            ckpt.step(target)
    wanted = data.random()
    again = random.Random(9)  # noqa: S311
    with checkpointing(directory, extras={"data": again}, **options) as ckpt:
        ckpt.restore(target, partial=True)
        goes_on = again.random() == wanted
        ckpt.restore(target, partial=True, which=2, discard_later=True)
        again.random()
        return goes_on and again.random() == wanted, fp.steps(directory)


def sleep(secs: float) -> None:
    time.sleep(secs)


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
