"""Where something once went wrong: each test tries every change of the stretch in which it did.

Which changes there are, and how many, is the engine's affair, and differs from run to run.
"""

from __future__ import annotations

from pathlib import Path

import points
import power
import promises
import pytest
from fileops import Kind
from nursery import Nursery
from points import Point
from promises import Said, Then


@pytest.fixture(scope="module")
def changes(nursery: Nursery) -> dict[str, int]:
    """How many changes each step makes."""
    counts: dict[str, int] = {}
    step = ""
    for event in points.changes_of(nursery):
        if event.path.startswith("begin "):
            step = event.path.removeprefix("begin ")
        counts[step] = counts.get(step, 0) + (event.kind is not Kind.MARK)
    return counts


@pytest.mark.parametrize(
    ("series", "step"),
    [
        ("EIO until mended", "small"),
        ("EIO once", "finalize"),
        ("EIO until mended", "finalize"),
        ("ENOSPC until mended", "finalize"),
        ("EIO once", "abort"),
    ],
)
def test_what_fails_at_its_very_end_has_happened_or_not(
    nursery: Nursery, changes: dict[str, int], series: str, step: str
) -> None:
    """Not, unless the disk refuses to undo it, or what is left to do is only to tidy up."""
    for at in range(changes[step] - 5, changes[step] + 3):
        point = Point(series, at, Then.FINALIZE, step)
        points.hold(nursery, point, with_orbax=False)


def test_directories_above_a_new_session_outlive_a_power_cut(
    nursery: Nursery, tmp_path: Path
) -> None:
    root, events = power.record(nursery, tmp_path, durable=True)
    end = next(i for i, event in enumerate(events) if event.path == "done large")
    power.hold(nursery.scratch, power.worst_cut(root, events[: end + 1]), promises.check)


def test_durable_save_after_one_that_need_not_be_outlives_a_power_cut(
    nursery: Nursery, tmp_path: Path
) -> None:
    root, events = power.record(nursery, tmp_path, durable=True, work="mixed")
    power.hold(nursery.scratch, power.worst_cut(root, events, Said(("small",))), promises.check)
