"""What checkpoints cost on a GPU: `python -m benchmarks.gpu`, on a machine that has one.

Needs JAX with CUDA (`pip install '.[bench]' 'jax[cuda13]'`). Prints how fast bytes come from the
device, beside the most that its link was seen to do; for how long training is held by a
checkpoint, in all and for each GB; and steps per second with and without, ours and Orbax's. With
`--allow-cpu --small` it runs anywhere, which shows that it runs and nothing else.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_backend

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks import report, train_loop, training
from benchmarks.__main__ import make_parser, run_all
from benchmarks.harness import Contender, Metrics, Scenario, Target

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_MIB = 1 << 20
_LINK, _MANY = "one array to pinned_host", "64 arrays to pinned_host"
_FULL = training.Size(
    vocabulary=8192, length=256, windows=32, width=768, layers=12, stages=4, every=100
)


def main() -> None:
    """Runs both scenarios; prints, writes JSON and draws what they measured."""
    arguments = _parse()
    device = _find_device(allow_cpu=arguments.allow_cpu)
    console = report.make_console()
    machine = report.describe_machine(arguments.directory) | {
        "device": device.device_kind,
        "platform": get_backend().platform_version,
    }
    console.print(machine)
    console.print(f"Saved while donated, six steps on: {_check_donation(arguments.directory)}")
    run_all((_transfer, _training), arguments, console, machine)


def _parse() -> argparse.Namespace:
    parser = make_parser("benchmarks.gpu", main.__doc__, "benchmarks/results/gpu.json")
    parser.add_argument("--allow-cpu", action="store_true", help="run even where there is no GPU")
    return parser.parse_args()


def _find_device(*, allow_cpu: bool) -> jax.Device:
    try:
        device = jax.devices()[0]
        found = f"JAX's default device is {device}"
    except (RuntimeError, AssertionError) as error:  # the latter where JAX_PLATFORMS=cuda
        device, found = None, f"JAX finds no device: {str(error) or 'no backend'}"
    if device is None or (device.platform != "gpu" and not allow_cpu):
        sys.exit(
            f"No GPU: {found}. Install JAX with CUDA (pip install 'jax[cuda13]'), or pass "
            "--allow-cpu --small to see that this script runs."
        )
    return device


def _training(*, small: bool) -> Scenario:
    return train_loop.build_for(training.SMALL if small else _FULL)


def _transfer(*, small: bool) -> Scenario:
    """Returns the scenario: 1 GiB of float32 from the device, as one array and as 64."""
    total, count = (64 * 4096, 64) if small else (1024 * _MIB, 64)
    one = jax.random.normal(jax.random.key(0), (total // 4096, 1024))
    many = {f"array_{i}": array for i, array in enumerate(jnp.split(one, count))}
    jax.block_until_ready(many)

    def rated(work: Callable[[Path], Metrics]) -> Callable[[Path], Metrics]:
        def run(path: Path) -> Metrics:
            metrics = work(path)
            return metrics | {"GB/s": total / metrics["total"] / 1e9}

        return run

    return Scenario(
        name="transfer",
        work=f"{total // _MIB:,} MiB from the device to the host",
        contenders=(
            Contender(_LINK, rated(lambda _: _fetch([one]))),
            Contender(_MANY, rated(lambda _: _fetch(list(many.values())))),
            Contender(by.OURS, rated(partial(by.save_ours_async, [many])), partial(_check, many)),
            Contender("Orbax v1, async", rated(partial(by.save_orbax_whole_async, [many]))),
            Contender(by.PLAIN, rated(partial(by.save_plainly, [many]))),
        ),
        targets=(
            Target.keeps("GB/s", _MANY, of=_LINK),
            Target.keeps("GB/s", by.OURS, of=_LINK),
            Target.keeps("GB/s", by.OURS, of="Orbax v1, async"),
            Target.keeps("GB/s", by.OURS, of=by.PLAIN),
        ),
        touched_bytes=2 * total,
        shown="GB/s",
    )


def _fetch(arrays: list[jax.Array]) -> Metrics:
    """Copies arrays to pinned host memory, all of them issued at once."""
    shardings = [array.sharding.with_memory_kind("pinned_host") for array in arrays]
    start = time.perf_counter()
    copies = jax.device_put(arrays, shardings, may_alias=False)
    issued = time.perf_counter()
    jax.block_until_ready(copies)
    return {"blocked": issued - start, "total": time.perf_counter() - start}


def _check(arrays: dict[str, jax.Array], path: Path) -> None:
    assert fp.verify(path).ok
    jax.tree.map(np.testing.assert_array_equal, arrays, fp.load(path))


@partial(jax.jit, donate_argnums=0)
def _step(arrays: list[jax.Array]) -> list[jax.Array]:
    return [array * 1.5 + 1 for array in arrays]


def _check_donation(directory: Path) -> str:
    """Saves arrays that are not yet computed, and are donated at once, again and again."""

    def begin() -> list[jax.Array]:
        return _step([jnp.full((1024, 1024), number, jnp.float32) for number in range(16)])

    expected = [np.asarray(array).copy() for array in begin()]
    with tempfile.TemporaryDirectory(dir=directory) as place:
        path = Path(place) / "donated"
        arrays = begin()
        fp.save_async(path, arrays)
        for _ in range(6):
            arrays = _step(arrays)
        fp.finalize(path)
        jax.tree.map(np.testing.assert_array_equal, expected, fp.load(path))
    return "right"


if __name__ == "__main__":
    main()
