"""Killed anywhere where control files are, not locks: finalize completes what was saved."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import points
import pytest
from fileops import NoCompilerError
from nursery import Nursery
from points import Point
from promises import Then

import flax_partial as fp
from flax_partial.storage import locks

_POINTS = 3


@pytest.fixture
def unlocked(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    monkeypatch.setenv(locks.VARIABLE, "files")
    try:
        server = Nursery(scratch)
    except NoCompilerError as error:
        pytest.skip(str(error))
    yield server
    server.close()


def test_killed_anywhere_finalize_completes_what_was_saved(unlocked: Nursery) -> None:
    """An abort that is killed may have dropped the session, and left its directory."""
    changes, _ = points.count_changes(unlocked)
    for at in random.Random(3).sample(range(changes), _POINTS):  # noqa: S311 - of points
        try:
            points.hold(unlocked, Point("killed", at, Then.FINALIZE), with_orbax=False)
        except fp.NoSessionError as error:
            assert any("(abort, after" in note for note in error.__notes__)  # noqa: PT017
