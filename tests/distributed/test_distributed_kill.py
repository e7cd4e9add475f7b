"""A few trials of `kill_stages.py`, one of each kind; by hand it runs as many as wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_stages import PHASES, Plan, run_trial

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_killed_stage_is_named_and_the_next_job_has_every_bit(
    tmp_path: Path, phase: str, victim: int
) -> None:
    plan = Plan(
        processes=3,
        victim=victim,
        phase=phase,
        step=3,
        delay_secs=0.004 * (1 + victim),
        is_service_apart=True,
        processes_after=3 - victim,
    )
    assert run_trial(plan, tmp_path) == "they named it"


def test_killed_process_that_the_coordination_service_lives_in_ends_all_and_loses_nothing(
    tmp_path: Path,
) -> None:
    plan = Plan(
        processes=2,
        victim=0,
        phase="finalizing",
        step=2,
        delay_secs=0.001,
        is_service_apart=False,
        processes_after=4,
    )
    assert run_trial(plan, tmp_path) in ("JAX ended them", "they named it")
