"""A save that shares an earlier checkpoint's data dies, fails, or sees the power go, anywhere."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import power
import pytest
import workload
from fileops import Action, Event, Kind, Plan
from nursery import Nursery
from points import Run
from promises import Said, Then, require, same
from workload import FIRST, REUSED, SECOND, THIRD

import flax_partial as fp

ORDER = ("save 1", "finalize 1", "save 2", "finalize 2", "remove 1", "save 9")


def run(nursery: Nursery, plan: Plan, step: str | None) -> Run:
    """The work of this module, in a process that a plan befalls."""
    return Run(nursery, plan, step, work="reusing")


def changes_of(events: list[Event], step: str) -> list[Event]:
    """What was done to the disk in one step."""
    texts = [event.path if event.kind is Kind.MARK else "" for event in events]
    within = events[texts.index(f"begin {step}") : texts.index(f"done {step}")]
    return [event for event in within if event.kind is not Kind.MARK]


def require_whole(path: Path, name: str) -> None:
    report = fp.verify(path)
    require(report.ok, f"{path}: {report.bad}")
    same(fp.load(path), REUSED[name], str(path))


def check(base: Path, said: Said) -> None:
    """What was promised holds; then the next job ends what was begun, and all is whole."""
    directory = workload.run_directory(base)
    first, second = directory / FIRST, directory / SECOND
    if not said.reached("remove 1") and said.reached("finalize 1"):
        require(first.exists() or "finalize 1" not in said.done, "finalized, and not there")
        if first.exists():
            require_whole(first, FIRST)
    if "save 2" in said.done:
        require(second.exists() or fp.status(second).leaves, "saved, and not there")
    for name in (FIRST, SECOND, THIRD):
        path = directory / name
        if not os.path.lexists(path) and not (name == FIRST and said.reached("remove 1")):
            end(base, name)
        if path.exists():
            require_whole(path, name)
    shutil.rmtree(first, ignore_errors=True)
    for name in (SECOND, THIRD):
        require_whole(directory / name, name)


def end(base: Path, name: str) -> None:
    """Finalizes what is there of a checkpoint, or saves it again, into what was left."""
    path = workload.run_directory(base) / name
    try:
        fp.finalize(path)
    except (fp.NoSessionError, fp.IncompleteCheckpointError):
        workload.save_reusing(base, name, durable=False)
        fp.finalize(path)


@pytest.fixture(scope="module")
def unharmed(nursery: Nursery) -> list[Event]:
    with run(nursery, Plan(), None) as done:
        assert done.status == 0, done.errors
        assert done.said.done == ORDER
        check(done.base, done.said)
        return done.events


@pytest.mark.parametrize(
    ("step", "action", "every"),
    [
        ("save 2", Action.KILL, 1),
        ("save 2", Action.TEAR, 1),
        ("finalize 2", Action.KILL, 5),
        ("remove 1", Action.KILL, 2),
        ("save 9", Action.KILL, 4),
    ],
)
def test_killed_anywhere_every_checkpoint_is_whole(
    nursery: Nursery,
    unharmed: list[Event],
    *,
    step: str,
    action: Action,
    every: int,
) -> None:
    changes = changes_of(unharmed, step)
    count = len(changes) if action is Action.KILL else sum(e.kind is Kind.WRITE for e in changes)
    for at in range(0, count + 1, every):
        with run(nursery, Plan(action, at), step) as done:
            assert done.status in {0, -9}, done.errors
            check(done.base, done.said)


def test_save_that_shares_links_one_file_and_writes_what_is_new(unharmed: list[Event]) -> None:
    changes = changes_of(unharmed, "save 2")
    (link,) = [event for event in changes if event.kind is Kind.LINK]
    assert link.other.endswith("/data.1")
    opened = [event.path for event in changes if event.kind is Kind.OPEN and event.flags]
    assert [Path(path).name for path in opened] == ["data", "part.json.tmp"]
    assert not [event for event in changes_of(unharmed, "save 9") if event.kind is Kind.LINK]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        *((Kind.LINK, error) for error in ("EXDEV", "EMLINK", "EPERM", "EACCES", "ENOENT", "EIO")),
        (Kind.FSYNC, "EIO"),
    ],
    ids=str,
)
def test_where_the_data_cannot_be_shared_it_is_written(
    nursery: Nursery, unharmed: list[Event], kind: Kind, error: str
) -> None:
    changes = changes_of(unharmed, "save 2")
    link = next(i for i, event in enumerate(changes) if event.kind is Kind.LINK)
    at = next(i for i, event in enumerate(changes) if i >= link and event.kind is kind)
    plan = Plan(Action.FAIL, at, 1, getattr(errno, error))
    with run(nursery, plan, "save 2") as done:
        assert done.status == 0, done.errors
        assert not done.said.failed
        assert [event.kind for event in done.events if event.was_forced] == [kind]
        assert not list((workload.run_directory(done.base) / SECOND).glob("state/part.*/data.1"))
        check(done.base, done.said)


def test_save_that_fails_anywhere_takes_nothing_from_the_earlier_checkpoint(
    nursery: Nursery, unharmed: list[Event]
) -> None:
    failed = 0
    for at in range(len(changes_of(unharmed, "save 2"))):
        with run(nursery, Plan(Action.FAIL, at, 1, errno.EIO), "save 2") as done:
            assert done.status == 0, done.errors  # it tries again, and succeeds
            failed += len(done.said.failed)
            check(done.base, done.said)
    assert failed > 3


@pytest.mark.parametrize("step", ["save 2", "finalize 2"])
def test_durable_save_makes_what_it_shares_durable(
    nursery: Nursery, tmp_path: Path, step: str
) -> None:
    """The first checkpoint's data need not outlive a cut of the power; the second's has to."""
    root, events = power.record(nursery, tmp_path, durable=True, work="reusing")
    done = next(i for i, event in enumerate(events) if event.path == f"done {step}")

    def check_second(base: Path, _said: Said, _then: Then) -> None:
        path = workload.run_directory(base) / SECOND
        if step == "save 2":
            fp.finalize(path)
        require_whole(path, SECOND)

    power.hold(nursery.scratch, power.worst_cut(root, events[: done + 1]), check_second)
