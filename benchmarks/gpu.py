"""What checkpoints cost on accelerators: `python -m benchmarks.gpu`, on a machine that has one.

Needs JAX for it (`pip install '.[bench]' 'jax[cuda13]'`). Prints, beside Orbax's figures and those
of the link and the storage, by how much saving delays training, how fast state leaves the device
and comes back, and what small leaves cost; each with its target. It takes `--minutes`, five by
default: what there is no time for is left out, and said. With `--allow-cpu --small` it runs
anywhere, which shows that it runs and nothing else.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.extend.backend import get_backend

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks import every_step, gpu_work, report
from benchmarks.__main__ import make_parser, run_all
from benchmarks.gpu_work import Work
from benchmarks.harness import Contender, Figure, Medium, Metrics, Scenario, Target

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_GIB = 1 << 30
_TMPFS = Path("/dev/shm")  # noqa: S108 - the only place that is surely in memory
_ORBAX = "Orbax v1, async"
_WHOLE, _LAYERS = f"{by.OURS}, one save", f"{by.OURS}, by layer"
_TOGETHER = f"{by.OURS}, layers in one call"
_BUDGET = f"{by.OURS}, by layer, 1 GiB in flight"
_DISK = f"{by.OURS}, one save, disk"
_ORBAX_DISK = f"{_ORBAX}, disk"
_COPY, _LINK = "copy on the device", "all arrays to pinned_host"


def main() -> None:
    """Runs all scenarios; prints, writes JSON and draws what they measured."""
    begun = time.monotonic()
    arguments = _parse()
    device = _find_device(allow_cpu=arguments.allow_cpu)
    console = report.make_console()
    machine = report.describe_machine(arguments.directory) | {
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "platform": get_backend().platform_version,
    }
    console.print(machine)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        _check_types(Path(place))
        _check_donation(Path(place))
    secs = time.monotonic() - begun
    console.print(
        f"Every dtype is right, and read by Orbax; so is what is donated at once ({secs:,.0f} s)."
    )
    ends_at = begun + 60 * arguments.minutes
    results = run_all(
        [*_SHARES], arguments, console, machine, shares=[*_SHARES.values()], ends_at=ends_at
    )
    report.print_summary(results, console)
    console.print(f"All of it took {(time.monotonic() - begun) / 60:.1f} minutes.")


def _parse() -> argparse.Namespace:
    parser = make_parser("benchmarks.gpu", main.__doc__, "benchmarks/results/gpu.json")
    parser.set_defaults(rounds=3)
    parser.add_argument("--minutes", type=float, default=5, help="what it may take; default 5")
    parser.add_argument("--allow-cpu", action="store_true", help="run even where there is no GPU")
    return parser.parse_args()


def _find_device(*, allow_cpu: bool) -> jax.Device:
    try:
        device = jax.devices()[0]
        found = f"JAX's default device is {device}"
    except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS=cuda
        device, found = None, f"JAX finds no device: {str(error) or 'no backend'}"
    if device is None or (device.platform == "cpu" and not allow_cpu):
        sys.exit(
            f"No GPU: {found}. Install JAX with CUDA (pip install 'jax[cuda13]'), or pass "
            "--allow-cpu --small to see that this script runs."
        )
    return device


# What is checked once.


def _check_types(directory: Path) -> None:
    """Saves leaves of every kind, and reads them with and, by Orbax, without a target."""
    state = {
        "bfloat16": jnp.ones((64, 64), jnp.bfloat16),
        "float8": jnp.ones((64, 64), jnp.float8_e4m3fn),
        "int4": jnp.ones((64, 64), jnp.int4),
        "complex": jnp.ones(5, jnp.complex64),
        "bool": jnp.ones(5, bool),
        "key": jax.random.key(1),
        "rbg key": jax.random.key(2, impl="rbg"),
        "empty": jnp.ones((0, 3)),
        "scalar": jnp.float32(2),
        **{str(device.id): jax.device_put(jnp.ones(9), device) for device in jax.local_devices()},
    }
    path = directory / "types"
    fp.save_async(path, state)
    fp.finalize(path)
    jax.tree.map(_require_equal, state, fp.load(path, state))
    by.read_by_orbax(path)


def _require_equal(expected: jax.Array, found: jax.Array) -> None:
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        expected, found = map(jax.random.key_data, (expected, found))
    assert expected.dtype == found.dtype
    assert expected.devices() == found.devices()
    assert np.asarray(expected).tobytes() == np.asarray(found).tobytes()


@partial(jax.jit, donate_argnums=0)
def _step(arrays: list[jax.Array]) -> list[jax.Array]:
    return [array * 1.5 + 1 for array in arrays]


def _check_donation(directory: Path) -> None:
    """Saves arrays that are not yet computed, and are donated at once, again and again."""

    def begin() -> list[jax.Array]:
        return _step([jnp.full((1024, 1024), number, jnp.float32) for number in range(16)])

    expected = [np.asarray(array).copy() for array in begin()]
    for number in range(5):  # from the third on, copies on the device may be used
        path = directory / f"donated {number}"
        arrays = begin()
        fp.save_async(path, arrays)
        for _ in range(6):
            arrays = _step(arrays)
        fp.finalize(path)
        jax.tree.map(np.testing.assert_array_equal, expected, fp.load(path))


# What is measured.


@cache
def _work(*, small: bool) -> Work:
    """4.3 GB in 64 arrays, or less, where that is more than an eighth of the device's memory."""
    if small:
        return Work(4, 256)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8 * _GIB)
    return Work(max(4, min(64, int(limit / 8) * jax.local_device_count() // (64 << 20))), 4096)


def _medium(size: int) -> Medium:
    """In memory, where there is room for it: no disk hides the rest."""
    has_room = _TMPFS.is_dir() and shutil.disk_usage(_TMPFS).free > 3 * size
    return "tmpfs" if has_room else "disk"


def _rate(name: str, at_least: float | None = None) -> Target:
    return Target(f"GB/s: {name}", Figure(name, "GB/s"), at_least=at_least)


_share = partial(Target.keeps, "GB/s")


def _training(*, small: bool) -> Scenario:
    """Returns the scenario: how long training is delayed, and until all is written."""
    work = _work(small=small)
    arrays = jax.tree.leaves(work.state)
    gigabytes = work.bytes / 1e9
    medium = _medium(work.bytes)
    budget = fp.SaveOptions(max_inflight_bytes=_GIB)

    def saving(name: str, save: Callable[..., Any], medium: Medium, limit: int | None) -> Contender:
        run = partial(work.saved, save, finalize=save is not gpu_work.by_orbax)
        return Contender(name, run, max_rounds=limit, medium=medium)

    return Scenario(
        name="training",
        work=f"{gigabytes:,.2f} GB in {len(arrays)} arrays, saved while each step donates them",
        contenders=(
            Contender(_COPY, lambda _: gpu_work.copied(work.state)),
            Contender(_LINK, lambda _: _rated(gpu_work.fetched(_arrays(work)), work.bytes)),
            saving(_WHOLE, gpu_work.whole, medium, None),
            saving(_LAYERS, gpu_work.by_layer, medium, None),
            saving(_TOGETHER, gpu_work.together, medium, None),
            saving(_BUDGET, partial(gpu_work.by_layer, options=budget), medium, None),
            saving(_ORBAX, gpu_work.by_orbax, medium, 2),
            saving(_DISK, gpu_work.whole, "disk", 2),
            saving(_ORBAX_DISK, gpu_work.by_orbax, "disk", 1),
        ),
        targets=(
            Target.below(Figure(_WHOLE, "delay/GB"), 3, "ms", unit=1e-3),
            Target.below(Figure(_LAYERS, "delay/GB"), 3.5, "ms", unit=1e-3),
            Target.below(Figure(_TOGETHER, "delay/GB"), 3.5, "ms", unit=1e-3),
            Target.below(Figure(_BUDGET, "delay/GB"), 3.5, "ms", unit=1e-3),
            Target.below(Figure(_LAYERS, "call"), 0.15, "ms", unit=1e-3),
            Target.within(Figure(_TOGETHER, "blocked"), of=Figure(_LAYERS, "blocked"), at_most=1),
            Target.below(Figure(_WHOLE, "first step"), 0.85 * gigabytes + 1, "ms", unit=1e-3),
            Target.faster(_WHOLE, than=_ORBAX, metric="delay"),
            _rate(_LINK),
            *(
                _rate(name, 10 if medium == "tmpfs" else None)
                for name in (_WHOLE, _LAYERS, _TOGETHER)
            ),
            _share(_WHOLE, of=_ORBAX, at_least=1),
            _share(_DISK, of=_ORBAX_DISK, at_least=1),
        ),
        touched_bytes=work.bytes,
        prepare=None if small else partial(_warm_up, work, medium),
        shown="delay/GB",
    )


def _warm_up(work: Work, medium: Medium, directory: Path) -> None:
    """Saves of each kind: memory is pinned, and after three the room on the device is known."""
    with tempfile.TemporaryDirectory(dir=_TMPFS if medium == "tmpfs" else directory) as place:
        for save in (gpu_work.whole, gpu_work.by_layer, gpu_work.together):
            work.saved(save, Path(place) / "warm")
            shutil.rmtree(Path(place) / "warm")


def _writers(*, small: bool) -> Scenario:
    """Returns the scenario: by how much more writers delay the thread that trains."""
    work = _work(small=small)

    def name(count: int) -> str:
        return f"{_LAYERS}, {count} writers"

    def run(count: int, path: Path) -> Metrics:
        with gpu_work.writers(count):
            return work.saved(gpu_work.by_layer, path)

    fewest, *more = counts = (2, 8, 16)
    return Scenario(
        name="writers",
        work=f"{work.bytes / 1e9:,.2f} GB, by layer, saved while each step donates them",
        contenders=tuple(
            Contender(name(count), partial(run, count), medium=_medium(work.bytes))
            for count in counts
        ),
        targets=(
            *(
                Target.below(Figure(name(count), "delay/GB"), 3.5, "ms", unit=1e-3)
                for count in counts
            ),
            *(
                Target.within(Figure(name(count), "blocked"), of=Figure(name(fewest), "blocked"))
                for count in more
            ),
            *(_rate(name(count)) for count in counts),
        ),
        touched_bytes=work.bytes,
        shown="blocked",
    )


def _arrays(work: Work) -> list[jax.Array]:
    arrays: list[jax.Array] = jax.tree.leaves(work.state)
    return arrays


def _rated(metrics: Metrics, size: int) -> Metrics:
    return metrics | {"GB/s": size / metrics["total"] / 1e9}


def _small(*, small: bool) -> Scenario:
    """Returns the scenario: for how long a call holds training that saves many small leaves."""
    trees = {
        "4,096 arrays of 4 KiB": gpu_work.small_leaves(64 if small else 4096),
        "300 layers of 10 leaves": gpu_work.optimizer_state(3 if small else 300),
    }
    jax.block_until_ready(trees)
    ways = {by.OURS: by.save_ours_async, _ORBAX: by.save_orbax_whole_async}

    def run(save: Callable[..., Metrics], tree: Any, path: Path) -> Metrics:
        return save([tree], path)

    def prepare(directory: Path) -> None:
        for number in range(3):
            for tree in trees.values():
                changed = jax.tree.map(jnp.copy, tree)
                by.save_ours_async([changed], directory / f"{len(tree)} {number}")

    return Scenario(
        name="small",
        work="one save of many small leaves, on the default device",
        contenders=tuple(
            Contender(f"{name}, {kind}", partial(run, save, tree), max_rounds=most)
            for kind, tree in trees.items()
            for (name, save), most in zip(ways.items(), (None, 1), strict=True)
        ),
        targets=(
            *(
                Target.below(Figure(f"{by.OURS}, {kind}", "blocked"), 30, "ms", unit=1e-3)
                for kind in trees
            ),
            *(
                Target.faster(f"{by.OURS}, {kind}", than=f"{_ORBAX}, {kind}", metric="blocked")
                for kind in trees
            ),
        ),
        prepare=prepare,
        shown="blocked",
    )


def _storage(*, small: bool) -> Scenario:
    """Returns the scenario: what the storage takes, from threads that do nothing else."""
    work = _work(small=small)
    state, size = jax.tree.map(jnp.copy, work.state), work.bytes
    data = gpu_work.host_pages(_arrays(work))
    counts = (1, 2) if small else (1, 4, 16)
    mediums: tuple[Medium, ...] = ("tmpfs", "disk") if _medium(size) == "tmpfs" else ("disk",)

    def label(medium: Medium, threads: int) -> str:
        return f"{threads} threads, {medium}"

    def ours(path: Path) -> Metrics:
        return _rated(by.save_ours_async([state], path), size)

    def threads(count: int, medium: Medium, path: Path) -> Metrics:
        return gpu_work.write_by_threads(data, count, path, direct=medium == "disk")

    return Scenario(
        name="storage",
        work=f"{size / 1e9:,.2f} GB, durable; plain threads write files of their own",
        contenders=tuple(
            contender
            for medium in mediums
            for contender in (
                *(
                    Contender(label(medium, count), partial(threads, count, medium), medium=medium)
                    for count in counts
                ),
                Contender(f"{by.OURS}, {medium}", ours, medium=medium),
            )
        ),
        targets=tuple(
            _share(
                f"{by.OURS}, {medium}",
                of=label(medium, count),
                at_least=0.9 if medium == "disk" else None,
            )
            for medium in mediums
            for count in counts
        ),
        touched_bytes=size,
        shown="GB/s",
    )


def _loading(*, small: bool) -> Scenario:
    """Returns the scenario: how fast a checkpoint comes to the device, and to NumPy."""
    work = _work(small=small)
    paths: dict[str, Path] = {}
    in_numpy = jax.tree.map(_numpy_like, work.target)

    def prepare(directory: Path) -> None:
        paths.update(ours=directory / "ours", orbax=directory / "orbax")
        fp.save(paths["ours"], work.state)
        fp.finalize(paths["ours"])
        for handle in gpu_work.by_orbax(paths["orbax"], work.state):
            handle.result()
        fp.load(paths["ours"])  # into the page cache

    def loading(load: Callable[[], Any]) -> Callable[[Path], Metrics]:
        def run(_: Path) -> Metrics:
            return _rated({"total": by.seconds(lambda: jax.block_until_ready(load()))}, work.bytes)

        return run

    def cold() -> Metrics:
        gpu_work.forget_pages(paths["ours"])
        return loading(lambda: fp.load(paths["ours"], work.target))(paths["ours"])

    page_cache, orbax = f"{by.OURS}, page cache", f"{_ORBAX}, page cache"
    link, numpy, disk = "pinned_host to the devices", f"{by.OURS}, to NumPy", f"{by.OURS}, cold"
    return Scenario(
        name="load",
        work=f"{work.bytes / 1e9:,.2f} GB onto the devices",
        contenders=(
            Contender(link, lambda _: _rated(gpu_work.sent(_arrays(work)), work.bytes)),
            Contender(page_cache, loading(lambda: fp.load(paths["ours"], work.target))),
            Contender(orbax, loading(lambda: ocp.load(paths["orbax"], work.target))),
            Contender(numpy, loading(lambda: fp.load(paths["ours"], in_numpy))),
            Contender(disk, lambda _: cold()),
        ),
        targets=(
            _rate(page_cache, 15),
            _share(page_cache, of=orbax, at_least=1),
            *map(_rate, (numpy, disk, link)),
        ),
        touched_bytes=work.bytes,
        prepare=prepare,
        shown="GB/s",
    )


_SHARES: dict[Callable[..., Scenario], int] = {
    _training: 5,
    _writers: 2,
    _small: 2,
    every_step.build: 2,
    _storage: 2,
    _loading: 2,
}
"""Each scenario, with its share of the time."""


def _numpy_like(leaf: jax.ShapeDtypeStruct) -> np.ndarray[Any, Any]:
    """A NumPy array of that shape and dtype that takes no memory."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


if __name__ == "__main__":
    main()
