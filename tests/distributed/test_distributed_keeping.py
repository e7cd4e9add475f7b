"""Real processes, each at a pace of its own, save the same steps: by the clock, or preempted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster import gather, running

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

PACES = (0.01, 0.017)


def assert_holds_all_of_each_step(directory: Path) -> None:
    for step in fp.steps(directory):
        state = fp.load(directory / str(step))
        assert {name: set(values) for name, values in state.items()} == {
            "of0": {step},
            "of1": {step},
        }
    assert not list(directory.glob("*.partial_save"))


def test_processes_save_the_same_steps_by_the_clock_and_before_they_are_taken(
    tmp_path: Path,
) -> None:
    """One job for both: to start one takes longer than either, and a job is preempted once."""
    with running(2, tmp_path) as two:
        clock = tmp_path / "clock"
        answers = {
            i: process.call(
                "train_until_told", str(clock), pause, interval_secs=0.3, most_steps=150
            )
            for i, (process, pause) in enumerate(zip(two.processes, PACES, strict=True))
        }
        (_, first), (_, second) = gather(answers)
        assert first == second == fp.steps(clock)
        assert len(first) >= 2
        assert_holds_all_of_each_step(clock)

        told = tmp_path / "told"
        answers = {
            i: process.call("train_until_told", str(told), pause, every_n_train_steps=100_000)
            for i, (process, pause) in enumerate(zip(two.processes, PACES, strict=True))
        }
        time.sleep(0.5)
        two.processes[1].terminate()
        (last, saved), other = gather(answers)
        assert (last, saved) == other
        assert saved == [last] == fp.steps(told)
        assert_holds_all_of_each_step(told)
