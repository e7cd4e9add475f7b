"""Thousands of checkpoints in one process: nothing grows.

    python tests/long_runs soak --checkpoints 5000 --seed 0

Each checkpoint is saved in several parts, at once and in the background, sometimes replaced,
sometimes aborted, finalized (now and then in the background), loaded, verified, and, but for the
newest few, removed. Some calls are wrong on purpose, so that what errors leave behind counts too.
From a tenth of the way on, memory, threads, descriptors, objects and files on disk are measured.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import trials
from memory import status_bytes

import flax_partial as fp

KEPT = 3
QUICK = fp.SaveOptions(durable=False, max_inflight_bytes=1 << 20)
# By how much the median of the last tenth may be more than that of the second. Pools of libraries
# start their threads when they first need them.
LIMITS = {"memory_bytes": 8 << 20, "objects": 2_000, "threads": 8, "descriptors": 0, "entries": 0}


@dataclass(frozen=True)
class Sample:
    """What the process holds at a moment.

    Attributes:
      memory_bytes: Its resident memory.
      objects: Number of objects that Python's cycle collector knows.
      threads: Number of threads, those of libraries included.
      descriptors: Number of open files.
      entries: Number of names in the directory of checkpoints.
    """

    memory_bytes: int
    objects: int
    threads: int
    descriptors: int
    entries: int

    @classmethod
    def taken(cls, directory: Path) -> Sample:
        gc.collect()
        return cls(
            memory_bytes=status_bytes("VmRSS"),
            objects=len(gc.get_objects()),
            threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208
            descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - names are enough
            entries=len(list(directory.iterdir())),
        )


def one_checkpoint(path: Path, choose: random.Random) -> None:
    """Makes a checkpoint, in one of many ways, and looks at it."""
    number = choose.randrange(1000)
    if choose.random() < 0.1:
        fp.save(path, {"gone": np.arange(number)}, options=QUICK)
        fp.save_async(path, {"gone too": np.arange(number)}, options=QUICK)
        fp.abort(path)
    state = {
        "small": np.arange(number),
        "large": np.full(choose.choice((10, 30_000)), number),
        "device": jax.numpy.arange(5) + number,
        "text": f"{number}",
        "list": [number, None, 0.5],
    }
    handles = [fp.save_async(path, {name: value}, options=QUICK) for name, value in state.items()]
    fp.save(path, {"small": state["small"]}, replace=True, options=QUICK)
    _fail(path, choose)
    choose.choice((fp.finalize, lambda path: fp.finalize_async(path).result()))(path)
    assert all(handle.done() for handle in handles)
    loaded = fp.load(path)
    assert set(loaded) == set(state)
    assert (loaded["large"] == number).all()
    assert fp.load(path, {"text": ""}, partial=True) == {"text": f"{number}"}
    assert fp.verify(path).ok


def _fail(path: Path, choose: random.Random) -> None:
    """Calls that are refused, or that fail on the way."""
    wrong: list[Callable[[], Any]] = [
        lambda: fp.save(path, {"list": {"no": "list"}}),
        lambda: fp.save_async(path, {"object": object()}),
        lambda: fp.load(path),
        lambda: fp.finalize(path, expect=["not there"]),
    ]
    with pytest.raises(fp.PartialCheckpointError):
        choose.choice(wrong)()


def soak(directory: Path, checkpoints: int, seed: int) -> list[Sample]:
    """Makes checkpoints; returns a sample after each fiftieth of the way, from a tenth on."""
    choose = random.Random(seed)  # noqa: S311 - of trials, not of secrets
    samples = []
    for step in range(checkpoints):
        one_checkpoint(directory / f"{step}", choose)
        if step >= KEPT:
            shutil.rmtree(directory / f"{step - KEPT}")
        if step >= checkpoints // 10 and step % max(checkpoints // 50, 1) == 0:
            _wait_for_threads()
            samples.append(Sample.taken(directory))
    return samples


def _wait_for_threads() -> None:
    """Threads of the pool end by themselves; a moment after the last result."""
    end = time.monotonic() + 10
    while time.monotonic() < end and any(
        thread.name.startswith("flax_partial") for thread in threading.enumerate()
    ):
        time.sleep(0.001)


def growth(samples: list[Sample]) -> list[str]:
    """Says what has grown."""
    first, last = samples[: len(samples) // 9 + 1], samples[-(len(samples) // 9 + 1) :]
    faults = []
    for name, most in LIMITS.items():
        before, after = (
            statistics.median(getattr(sample, name) for sample in some) for some in (first, last)
        )
        if after - before > most:
            faults.append(f"{name} went from {before:.0f} to {after:.0f}")
    return faults


def main() -> int:
    options = trials.options(__doc__ or "", checkpoints=5_000, seed=0)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        samples = soak(Path(directory), options.checkpoints, options.seed)
    faults = growth(samples)
    for fault in faults:
        trials.say(fault)
    found = ", ".join(
        f"{name} {getattr(samples[0], name)} to {getattr(samples[-1], name)}" for name in LIMITS
    )
    trials.say(
        f"{options.checkpoints} checkpoints, {'something grew' if faults else 'nothing grew'}: "
        f"{found}; seed {options.seed}, {time.monotonic() - begun:.0f} s"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
