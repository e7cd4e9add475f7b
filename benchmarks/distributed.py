"""`distributed`: four processes save together, as stages of their own (MPMD) and as one (SPMD).

Orbax's partial saving refuses arrays that are one process's own where there are several, so of the
two layouts it can do the second only. Every contender starts its processes anew; what is measured
begins when all of them stand ready, and ends when the last of them has done its work.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import flax_partial as fp
from benchmarks import child
from benchmarks import distributed_process as process
from benchmarks.harness import Contender, Figure, Metrics, Scenario, Target

if TYPE_CHECKING:
    from pathlib import Path

_MIB = 1 << 20
_OURS_MPMD, _OURS_SPMD = "flax_partial, MPMD", "flax_partial, SPMD"
_PARTIAL_SPMD, _WHOLE_SPMD = "Orbax v1.partial, SPMD", "Orbax v1, one whole save, SPMD"
_WAYS = {
    _OURS_MPMD: "ours_mpmd",
    _OURS_SPMD: "ours_spmd",
    _PARTIAL_SPMD: "orbax_partial_spmd",
    _WHOLE_SPMD: "orbax_whole_spmd",
}


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
            Contender(name, partial(run, way), partial(_check, groups, size))
            for name, way in _WAYS.items()
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
      `blocked`: for how long the saves held their callers, `finalize` and `total`, in seconds.
    """
    port = _free_port()
    running = [
        child.start(
            "distributed_process", index, processes, port, way, groups, size, path, devices=2
        )
        for index in range(processes)
    ]
    try:
        said = [child.answer(one) for one in running]
    finally:
        for one in running:
            one.kill()
    return {name: max(metrics[name] for metrics in said) for name in said[0]}


def _check(groups: int, size: int, path: Path) -> None:
    """Loads what the processes saved, in this one, and compares."""
    target = {
        f"group_{number}": {"kernel": np.empty(process.shape_of(size), np.float32)}
        for number in range(groups)
    }
    loaded = fp.load(path, target)
    for number in range(groups):
        expected = process.values_of(number, size)
        np.testing.assert_array_equal(loaded[f"group_{number}"]["kernel"], expected)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
