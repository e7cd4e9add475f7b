"""Killed at whatever change of a removal: a checkpoint is there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import points
import pytest
import workload
from nursery import Nursery

import flax_partial as fp


@pytest.fixture(scope="module")
def two(scratch: Path) -> Path:
    """A run of two checkpoints, of which the older one is to go."""
    base = scratch / "two"
    for name in (workload.FIRST, workload.SECOND):
        path = workload.run_directory(base) / name
        fp.save(path, {"a": np.full(99, int(name)), "b": "text"})
        fp.save(path, {"c": [np.arange(5), 1.5]})
        fp.finalize(path)
    return base


def test_removal_killed_anywhere_leaves_no_half_and_the_next_run_sweeps_up(
    nursery: Nursery, two: Path
) -> None:
    seen = []
    for base, _ in points.deaths(nursery, two, "removal"):
        run = workload.run_directory(base)
        steps = fp.steps(run)
        assert steps in ([1, 2], [2])
        for step in steps:
            assert fp.verify(run / str(step)).ok
            np.testing.assert_array_equal(fp.load(run / str(step))["a"], np.full(99, step))
        hidden = [entry for entry in run.iterdir() if entry.name.startswith(".")]
        seen.append((len(steps), len(hidden)))
        workload.begin(base)
        assert {entry.name for entry in run.iterdir()} - {"timeline"} == set(map(str, steps))
        workload.remove(base)
        assert fp.steps(run) == [2]
    assert len(seen) > 10
    assert set(seen) == {(2, 0), (1, 1), (1, 0)}
