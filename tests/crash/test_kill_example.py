"""The main example, killed again and again and started again, loses nothing and ends the same.

`kill_example.py` does it as often as one likes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_example import EVERY_STEP, Example, Trials, Unbroken


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_from_the_newest_complete_checkpoint(
    tmp_path: Path,
) -> None:
    example = Example("pipeline_lm.py", tmp_path / "compiled", *EVERY_STEP)
    unbroken = Unbroken.of(example, tmp_path / "unbroken")
    assert unbroken.steps == [10, 11, 12]
    trials = Trials(example, unbroken, tmp_path, seed=0)
    assert list(trials.run(4))
    assert trials.kills >= 4
    assert trials.ends >= 1
