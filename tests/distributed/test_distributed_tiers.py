"""Real processes of one job that train in two tiers: one local tier for all, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import gather, running, start_each

import flax_partial as fp


def test_processes_of_one_machine_share_a_tier_and_those_of_several_are_refused(
    tmp_path: Path,
) -> None:
    """One job for both: to start it takes longer than each."""
    remote, how = tmp_path / "remote", {"every_n_train_steps": 1, "most_steps": 4}
    with running(2, tmp_path) as two:
        answers = [
            one.call("train_until_told", remote, 0.01, local=tmp_path / f"of{process}", **how)
            for process, one in enumerate(two.processes)
        ]
        for answer in answers:
            with pytest.raises(ValueError, match=r"local=.* in the processes \[1\] than in"):
                answer.result()
        assert fp.steps(remote) == []
        shared = tmp_path / "shared"
        answers = start_each(two, "train_until_told", remote, (0.01, 0.02), local=shared, **how)
        assert gather(answers) == [(4, [1, 2, 3, 4])] * 2
    assert fp.steps(remote) == [1, 2, 3, 4]
    assert fp.load(remote / "4").keys() == {"of0", "of1"}
    assert fp.verify(remote / "4").ok
