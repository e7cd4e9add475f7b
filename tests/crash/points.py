"""Crash points: a process dies, or its disk fails, at one change; what must hold then?"""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import promises
from fileops import FOR_GOOD, Action, Event, Kind, Plan, read_log
from nursery import Job, Nursery
from promises import Said, Then, require


@dataclass(frozen=True)
class Series:
    """A harm that befalls every change in turn.

    Attributes:
      action: What it is.
      times: How many changes it befalls, from the first on.
      error: The error number of FAIL.
      exits: Whether the process ends at its first error, its disk still failing.
    """

    action: Action
    times: int = 1
    error: int = 0
    exits: bool = False

    @property
    def is_of_writes(self) -> bool:
        """Whether it befalls writes only."""
        return self.action in {Action.TEAR, Action.SHORTEN}


def _series() -> Iterator[tuple[str, Series]]:
    yield "killed", Series(Action.KILL)
    yield "killed in a write", Series(Action.TEAR)
    for name in ("EIO", "ENOSPC", "EDQUOT", "EACCES"):
        error = getattr(errno, name)
        yield f"{name} once", Series(Action.FAIL, 1, error)
        yield f"{name} until mended", Series(Action.FAIL, FOR_GOOD, error)
        yield f"{name} for good", Series(Action.FAIL, FOR_GOOD, error, exits=True)
    yield "EINTR once", Series(Action.FAIL, 1, errno.EINTR)
    yield "EINTR five times", Series(Action.FAIL, 5, errno.EINTR)  # Python itself tries for ever
    yield "one short write", Series(Action.SHORTEN)
    yield "short writes", Series(Action.SHORTEN, FOR_GOOD)


SERIES = dict(_series())


@dataclass(frozen=True)
class Point:
    """One crash point.

    Attributes:
      series: Name of a series.
      at: Number of the change that it befalls.
      then: What is done with an unfinished checkpoint afterwards.
      step: The step from whose beginning on changes are counted; None for the first.
    """

    series: str
    at: int
    then: Then
    step: str | None = None


class Run:
    """A job that was done in a place of its own, which goes when the context ends.

    Attributes:
      base: What it worked on.
      status: Its exit status.
      events: All that it did, and said.
      said: What it said.
      errors: What it wrote to standard error.
    """

    def __init__(
        self,
        nursery: Nursery,
        plan: Plan | None = None,
        step: str | None = None,
        **how: Any,
    ) -> None:
        self._own = Path(tempfile.mkdtemp(dir=nursery.scratch))
        self.base = self._own / "disk"
        self.base.mkdir()
        log = self._own / "log"
        self.status = nursery.run(Job(self.base, log, plan or Plan(), step, **how))
        self.events = read_log(log)
        self.said = Said.of(self.events)
        self.errors = log.with_name("log.stderr").read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._own)


def deaths(nursery: Nursery, template: Path, work: str) -> Iterator[tuple[Path, bool]]:
    """Does some work in copies of a directory, and dies at one change after the other.

    Yields:
      A copy, and whether the process died in it; the last one, which came to the end, did not.
    """
    for at in itertools.count():
        base = Path(tempfile.mkdtemp(dir=nursery.scratch)) / "disk"
        shutil.copytree(template, base)
        was_killed = dies(nursery, base, work, at)
        yield base, was_killed
        shutil.rmtree(base.parent)
        if not was_killed:
            return


def dies(nursery: Nursery, base: Path, work: str, at: int) -> bool:
    """Does some work in a process that dies at change number `at`; returns whether it did."""
    log = base.with_name(f"{work}.log")
    status = nursery.run(Job(base, log, Plan(Action.KILL, at), work=work))
    require(status in {-9, 0}, f"{work} ended with {status} at change {at}")
    return status != 0


def changes_of(nursery: Nursery) -> list[Event]:
    """Runs the work unharmed; returns all that it does, and says."""
    with Run(nursery) as run:
        require(run.status == 0, f"the work fails even where nothing does: {run.errors}")
        return run.events


def count_changes(nursery: Nursery) -> tuple[int, int]:
    """Returns how many changes the work makes, and how many of them are writes."""
    kinds = [event.kind for event in changes_of(nursery)]
    return len(kinds) - kinds.count(Kind.MARK), kinds.count(Kind.WRITE)


def sample(counts: tuple[int, int], size: int, seed: int) -> list[Point]:
    """Draws crash points, the same number of each series."""
    draw = random.Random(seed)  # noqa: S311 - of points, not of secrets
    points = []
    for number, (name, series) in enumerate(SERIES.items()):
        most = counts[series.is_of_writes]
        share = size * (number + 1) // len(SERIES) - size * number // len(SERIES)
        chosen = draw.sample(range(most), min(share, most))
        points += [Point(name, at, draw.choice(list(Then))) for at in chosen]
    return points


def every(counts: tuple[int, int], names: list[str], seed: int) -> list[Point]:
    """Every crash point of some series."""
    draw = random.Random(seed)  # noqa: S311 - as above
    each = ((name, at) for name in names for at in range(counts[SERIES[name].is_of_writes]))
    return [Point(name, at, draw.choice(list(Then))) for name, at in each]


def hold(nursery: Nursery, point: Point, *, durable: bool = True, with_orbax: bool = True) -> str:
    """Tries one crash point.

    Returns:
      Where it was, in words.

    Raises:
      BrokenPromiseError: Something that was promised does not hold; it says where.
    """
    series = SERIES[point.series]
    plan = Plan(series.action, point.at, series.times, series.error)
    how = {"durable": durable, "exits": series.exits}
    with Run(nursery, plan, point.step, **how) as run:
        where = f"{run.said.began or run.said.done[-1]}, {_place(run.events, plan)}"
        try:
            _require_outcome(series, run)
            promises.check(run.base, run.said, point.then, with_orbax=with_orbax)
        except Exception as error:
            error.add_note(f"{point} ({where})")
            raise
    return where


def _place(events: list[Event], plan: Plan) -> str:
    changes = [event for event in events if event.kind is not Kind.MARK]
    if plan.action is Action.FAIL:
        return next((str(event) for event in changes if event.was_forced), "nothing failed")
    return f"after {changes[-1]}" if changes else "before anything"


def _require_outcome(series: Series, run: Run) -> None:
    """The process died as planned, or lived; what it raised is what the disk said."""
    status, said, stderr = run.status, run.said, run.errors
    if series.action in {Action.KILL, Action.TEAR}:
        require(status in {-9, 0}, f"it ended with {status}: {stderr}")
        return
    is_fine = status == 0 or (series.exits and status == 1 and said.failed)
    require(is_fine, f"it ended with {status} and raised {said.failed}: {stderr}")
    if series.action is Action.SHORTEN:
        require(not said.failed, f"a short write was not gone on with: {said.failed}")
    for name, error in said.failed:
        kinds, number, _ = error.split(" ", 2)
        require("OSError" in kinds.split(","), f"{name} raised {error}")
        require(number == str(series.error), f"{name} raised {error}, not {series.error}")
