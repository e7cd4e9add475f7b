"""Killed at whatever change of a removal: a checkpoint is there whole, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import workload
from fileops import Action, Kind, Plan, read_log
from nursery import Job, Nursery

import flax_partial as fp

KILLED = -9


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


def killed_at(nursery: Nursery, template: Path, at: int) -> tuple[Path, int]:
    """Removes in a process that dies at change number `at`; what is left, and how it ended."""
    base = template.with_name(f"killed at {at}")
    shutil.copytree(template, base)
    plan = Plan(Action.KILL, at, 1) if at >= 0 else Plan()
    return base, nursery.run(Job(base, base.with_suffix(".log"), plan, work="removal"))


def test_removal_killed_anywhere_leaves_no_half_and_the_next_run_sweeps_up(
    nursery: Nursery, two: Path
) -> None:
    base, status = killed_at(nursery, two, -1)
    assert status == 0
    log = read_log(base.with_suffix(".log"))
    changes = sum(event.kind is not Kind.MARK for event in log)
    assert changes > 10
    seen = set()
    for at in range(changes):
        base, status = killed_at(nursery, two, at)
        assert status == KILLED
        run = workload.run_directory(base)
        steps = fp.steps(run)
        assert steps in ([1, 2], [2])
        for step in steps:
            assert fp.verify(run / str(step)).ok
            np.testing.assert_array_equal(fp.load(run / str(step))["a"], np.full(99, step))
        hidden = [entry for entry in run.iterdir() if entry.name.startswith(".")]
        seen.add((len(steps), len(hidden)))
        workload.begin(base)
        assert {entry.name for entry in run.iterdir()} - {"timeline"} == set(map(str, steps))
        workload.remove(base)
        assert fp.steps(run) == [2]
        shutil.rmtree(base)
    assert seen - {(1, 0)} == {(2, 0), (1, 1)}  # or it was done
