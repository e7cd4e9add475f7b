"""Saves many small groups one after the other, for the scenario `long_session`.

Run as `python -m benchmarks.long_session_process ours|orbax COUNT PATH`, in a fresh process each
time: memory that an earlier session has left would be used again without showing. Prints what it
measured, as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orbax.checkpoint.experimental.v1 as ocp

import flax_partial as fp
from benchmarks import contenders as by
from benchmarks.memory_use import peak_growth, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.harness import Metrics

LEAVES = 10
_WARM_UP = 5


def edge_of(count: int) -> int:
    """Returns how many of so many saves are the first ones, or the last: a twentieth."""
    return max(1, count // 20)


def groups_of(count: int) -> Iterator[by.Group]:
    """Yields the groups that are saved, the same in every process, each to be dropped after that.

    An array that was saved holds a NumPy view of itself, which is no memory of the session's.
    """
    return by.each_group(count, leaves=LEAVES, shape=(64,))


def _run(
    count: int,
    *,
    save: Callable[[by.Group], object],
    finalize: Callable[[], object],
    load: Callable[[], Any],
) -> Metrics:
    """Saves group by group, finalizes, loads.

    Returns:
      `save`, `finalize`, `load`: in all. `first 5 %`, `last 5 %`: the median save of those.
      `growth`: of the resident memory after the first of them, until all is saved, in bytes.
    """
    secs: list[float] = []
    edge = edge_of(count)
    resident = 0
    for number, group in enumerate(groups_of(count)):
        if number == edge:
            resident = resident_bytes()
        secs.append(_timed(lambda group=group: save(group)))
    growth = resident_bytes() - resident
    finalized, loaded = _timed(finalize), _timed(load)
    return {
        "first 5 %": statistics.median(secs[:edge]),
        "last 5 %": statistics.median(secs[-edge:]),
        "save": sum(secs),
        "finalize": finalized,
        "load": loaded,
        "total": sum(secs) + finalized + loaded,
        "growth": growth,
    }


def _timed(work: Callable[[], object]) -> float:
    """Returns how long `work` takes; what it returns is dropped after that."""
    start = time.perf_counter()
    kept = work()
    secs = time.perf_counter() - start
    del kept
    return secs


def _run_ours(count: int, path: Path) -> Metrics:
    return _run(
        count,
        save=partial(fp.save, path),
        finalize=partial(fp.finalize, path),
        load=partial(fp.load, path),
    )


def _run_orbax(count: int, path: Path) -> Metrics:
    return _run(
        count,
        save=partial(ocp.partial.save, path),
        finalize=partial(ocp.partial.finalize, path),
        load=partial(by.read_by_orbax, path),
    )


def main() -> None:
    """Does what the command line says."""
    way, count, path = sys.argv[1:]
    run = {"ours": _run_ours, "orbax": _run_orbax}[way]
    run(_WARM_UP, Path(f"{path}.warm_up"))
    with peak_growth() as growth:
        metrics = run(int(count), Path(path))
    print(json.dumps(metrics | {"memory": growth.bytes}))


if __name__ == "__main__":
    main()
