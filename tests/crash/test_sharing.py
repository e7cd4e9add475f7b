"""A save that shares an earlier checkpoint's data dies, fails, or sees the power go, anywhere."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import power
import pytest
import workload
from disk import Disk, write_tree
from fileops import Action, Event, Kind, Plan, read_log
from nursery import Job
from promises import Said, require, same
from workload import FIRST, REUSED, SECOND, THIRD

import flax_partial as fp

if TYPE_CHECKING:
    from nursery import Nursery

ORDER = ("save 1", "finalize 1", "save 2", "finalize 2", "remove 1", "save 9")


class Run:
    """One run of the work, in a process that a plan befalls, and what is on the disk after it."""

    def __init__(self, nursery: Nursery, scratch: Path, plan: Plan, step: str | None) -> None:
        self.own = Path(tempfile.mkdtemp(dir=scratch))
        self.base = self.own / "disk"
        self.base.mkdir()
        job = Job(self.base, self.own / "log", plan, step, work="reusing")
        self.status = nursery.run(job)
        self.events = read_log(self.own / "log")
        self.said = Said.of(self.events)
        self.errors = (self.own / "log.stderr").read_text(errors="replace")

    def path(self, name: str) -> Path:
        return workload.run_directory(self.base) / name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.own)


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
def unharmed(nursery: Nursery, scratch: Path) -> list[Event]:
    with Run(nursery, scratch, Plan(), None) as run:
        assert run.status == 0, run.errors
        assert run.said.done == ORDER
        check(run.base, run.said)
        return run.events


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
    scratch: Path,
    unharmed: list[Event],
    *,
    step: str,
    action: Action,
    every: int,
) -> None:
    changes = changes_of(unharmed, step)
    count = len(changes) if action is Action.KILL else sum(e.kind is Kind.WRITE for e in changes)
    for at in range(0, count + 1, every):
        with Run(nursery, scratch, Plan(action, at), step) as run:
            assert run.status in {0, -9}, run.errors
            check(run.base, run.said)


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
    nursery: Nursery, scratch: Path, unharmed: list[Event], kind: Kind, error: str
) -> None:
    changes = changes_of(unharmed, "save 2")
    link = next(i for i, event in enumerate(changes) if event.kind is Kind.LINK)
    at = next(i for i, event in enumerate(changes) if i >= link and event.kind is kind)
    plan = Plan(Action.FAIL, at, 1, getattr(errno, error))
    with Run(nursery, scratch, plan, "save 2") as run:
        assert run.status == 0, run.errors
        assert not run.said.failed
        assert [event.kind for event in run.events if event.was_forced] == [kind]
        assert not list(run.path(SECOND).glob("state/part.*/data.1"))
        check(run.base, run.said)


def test_save_that_fails_anywhere_takes_nothing_from_the_earlier_checkpoint(
    nursery: Nursery, scratch: Path, unharmed: list[Event]
) -> None:
    failed = 0
    for at in range(len(changes_of(unharmed, "save 2"))):
        with Run(nursery, scratch, Plan(Action.FAIL, at, 1, errno.EIO), "save 2") as run:
            assert run.status == 0, run.errors  # it tries again, and succeeds
            failed += len(run.said.failed)
            check(run.base, run.said)
    assert failed > 3


@pytest.mark.parametrize("step", ["save 2", "finalize 2"])
def test_durable_save_makes_what_it_shares_durable(
    nursery: Nursery, scratch: Path, tmp_path: Path, step: str
) -> None:
    """The first checkpoint's data need not outlive a cut of the power; the second's has to."""
    root, events = power.record(nursery, tmp_path, durable=True, work="reusing")
    done = next(i for i, event in enumerate(events) if event.path == f"done {step}")
    disk = Disk(root)
    disk.replay(events[: done + 1])
    base = scratch / "cut"
    base.mkdir()
    try:
        write_tree(disk.after_cut(), base)
        path = workload.run_directory(base) / SECOND
        if step == "save 2":
            fp.finalize(path)
        require_whole(path, SECOND)
    finally:
        shutil.rmtree(base)
