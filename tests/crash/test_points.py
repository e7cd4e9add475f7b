"""A process dies, or its disk fails, at some change: what was promised holds, and work goes on.

A sample of the points that `sweep.py` tries, the same one in every run.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import points
import power
import pytest
from fileops import Action, Plan, read_log
from nursery import Job, Nursery
from points import SERIES, Point

_EACH = 2


@pytest.fixture(scope="module")
def chosen(nursery: Nursery) -> dict[str, list[Point]]:
    """Series to some points of it."""
    counts = points.count_changes(nursery)
    drawn = points.sample(counts, _EACH * len(SERIES), seed=0)
    return {name: list(group) for name, group in itertools.groupby(drawn, lambda p: p.series)}


@pytest.mark.parametrize("series", SERIES)
def test_what_was_promised_holds_after_a_process_was(
    nursery: Nursery, chosen: dict[str, list[Point]], series: str
) -> None:
    for point in chosen[series]:
        points.hold(nursery, point)


def test_killed_anywhere_what_was_promised_holds_without_durable_too(
    nursery: Nursery, chosen: dict[str, list[Point]]
) -> None:
    for point in chosen["killed"] + chosen["killed in a write"]:
        points.hold(nursery, point, durable=False)


def test_the_record_leads_to_the_very_files_that_are_there(
    nursery: Nursery, tmp_path: Path
) -> None:
    root, events = power.record(nursery, tmp_path, durable=True)
    assert any(event.path.startswith(f"{root}/runs/lm/1") for event in events)
    assert sum(len(event.data) for event in events) > 5_000_000  # every byte of the arrays


@pytest.mark.parametrize("action", [Action.KILL, Action.TEAR])
def test_a_killed_process_changes_nothing_more(
    nursery: Nursery, tmp_path: Path, action: Action
) -> None:
    for at in (0, 7):
        base, log = tmp_path / f"disk{at}", tmp_path / f"log{at}"
        base.mkdir()
        assert nursery.run(Job(base, log, Plan(action, at))) == -9
        changes = [event for event in read_log(log) if event.kind and event.kind.name != "MARK"]
        writes = [event for event in changes if event.kind.name == "WRITE"]
        assert len(changes if action is Action.KILL else writes) == at + (action is Action.TEAR)
