"""Threads of several processes do everything at once, to the same paths: as the model allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import stress
from things import QUICK

import flax_partial as fp


def test_all_at_once_is_as_if_one_after_the_other(tmp_path: Path) -> None:
    """A few seconds of `stress.py`, which says what holds; a script for longer."""
    count, faults = stress.run(tmp_path, processes=4, threads=16, secs=3.0, seed=7)
    assert not faults, "\n".join(faults[:20])
    assert count > 200


def test_the_model_notices_what_is_lost_mixed_up_or_too_much(tmp_path: Path) -> None:
    """The check above can fail: a checkpoint is held against notes that do not tell the truth."""
    path = tmp_path / "run" / "0"
    notes = []
    for kind, number in (("save", 1), ("save", 2), ("replace", 3), ("replace", 4)):
        notes.append(stress.do(path.parent, kind, "0", number, 0))
    notes.append(stress.do(path.parent, "finalize", "0", 5, 0))
    notes.append(stress.do(path.parent, "load", "0", 6, 0))
    assert not stress.faults_in(path.parent, notes)
    commit = notes[4]
    untrue = {
        "failed": [replace(notes[0], error="OSError"), *notes[1:]],
        "is lost": [*notes, replace(notes[0], number=9, key="own9")],
        "was replaced": [*notes, replace(notes[3], number=9, begun=commit.begun - 1e-9)],
        "was dropped": [
            *notes,
            replace(commit, kind="abort", begun=notes[3].ended + 1e-9, ended=commit.begun - 1e-9),
        ],
        "after the commit": [*notes, replace(notes[0], key="own9", begun=commit.ended + 1)],
        "2 times": [*notes, commit],
        "something else": [*notes[:5], replace(notes[5], value={})],
        "not allowed": [*notes, replace(notes[0], error="not allowed: ValueError")],
    }
    for fault, told in untrue.items():
        found = stress.faults_in(path.parent, told)
        assert any(fault in one for one in found), (fault, found)
    fp.save(tmp_path / "run" / "left", {"a": np.arange(3)}, options=QUICK)
    assert "'left.partial_save' is left" in stress.faults_in(path.parent, notes)
