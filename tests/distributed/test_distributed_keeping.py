"""Real processes, each at a pace of its own, save the same steps: by the clock, or preempted."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import numpy as np
import pytest
from cluster import gather, running, start_each
from things import until

import flax_partial as fp
from flax_partial.callbacks import checkpointing

PACES = (0.01, 0.017)


def assert_holds_all_of_each_step(directory: Path) -> None:
    for step in fp.steps(directory):
        state = fp.load(directory / str(step))
        assert {name: set(values) for name, values in state.items()} == {
            f"of{i}": {step} for i in range(2)
        }
    assert not list(directory.glob("*.partial_save"))


def test_processes_save_the_same_steps_by_the_clock_and_before_they_are_taken(
    tmp_path: Path,
) -> None:
    """One job for all: to start one takes longer than each, and a job is preempted once."""
    with running(2, tmp_path) as two:
        clock = tmp_path / "clock"
        how = {"interval_secs": 0.3, "most_steps": 150}
        answers = start_each(two, "train_until_told", clock, PACES, **how)
        (_, first), (_, second) = gather(answers)
        assert first == second == fp.steps(clock)
        assert len(first) >= 2
        assert_holds_all_of_each_step(clock)

        behind = tmp_path / "behind"
        how = {"every_n_train_steps": 1, "when_behind": "skip", "most_steps": 25}
        (_, first), (_, second) = gather(start_each(two, "train_until_told", behind, PACES, **how))
        assert first == second == fp.steps(behind)
        assert first[-1] == 25
        assert_holds_all_of_each_step(behind)
        data = tmp_path / "data"
        assert two.call("goes_on_with_its_own_data", data) == [(True, [1, 2])] * 2
        with (
            checkpointing(data, extras={"data": random.Random(0)}) as ckpt,  # noqa: S311
            pytest.raises(fp.TargetMismatchError, match="by 2 processes, and there are 1 now"),
        ):
            ckpt.restore({"of0": np.zeros(2)}, partial=True)

        told = tmp_path / "told"
        how = {"every_n_train_steps": 100_000}
        answers = start_each(two, "train_until_told", told, PACES, **how)
        until(lambda: set(tmp_path.glob("told.*")) == {tmp_path / "told.0", tmp_path / "told.1"})
        two.processes[1].send(signal.SIGTERM)
        (last, saved), other = gather(answers)
        assert (last, saved) == other
        assert saved == [last] == fp.steps(told)
        assert_holds_all_of_each_step(told)
