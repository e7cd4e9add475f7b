"""Crash points: a process dies, or its disk fails, at one change; what must hold then?"""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import promises
from fileops import FOR_GOOD, Action, Kind, Plan, read_log
from nursery import Job
from promises import Said, Then, require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fileops import Event
    from nursery import Nursery


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

    def plan(self, at: int) -> Plan:
        """The harm at one change."""
        return Plan(self.action, at, self.times, self.error)


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


def changes_of(nursery: Nursery, directory: Path) -> list[Event]:
    """Runs the work unharmed; returns all that it does, and says."""
    base, log = _new(directory)
    status = nursery.run(Job(base, log))
    require(status == 0, f"the work fails even where nothing does: {_stderr(base)}")
    events = read_log(log)
    shutil.rmtree(base.parent)
    return events


def count_changes(nursery: Nursery, directory: Path) -> tuple[int, int]:
    """Returns how many changes the work makes, and how many of them are writes."""
    kinds = [event.kind for event in changes_of(nursery, directory)]
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
    return [
        Point(name, at, draw.choice(list(Then)))
        for name in names
        for at in range(counts[SERIES[name].is_of_writes])
    ]


def hold(
    nursery: Nursery,
    directory: Path,
    point: Point,
    *,
    durable: bool = True,
    with_orbax: bool = True,
) -> str:
    """Tries one crash point below `directory`.

    Returns:
      Where it was, in words.

    Raises:
      BrokenPromiseError: Something that was promised does not hold; it says where.
    """
    series = SERIES[point.series]
    plan = series.plan(point.at)
    base, log = _new(directory)
    job = Job(base, log, plan, point.step, durable=durable, exits=series.exits)
    status, events = nursery.run(job), read_log(log)
    said = Said.of(events)
    where = f"{said.began or said.done[-1]}, {_place(events, plan)}"
    try:
        _require_outcome(series, status, said, _stderr(base))
        promises.check(base, said, point.then, with_orbax=with_orbax)
    except Exception as error:
        error.add_note(f"{point} ({where})")
        raise
    finally:
        shutil.rmtree(base.parent)
    return where


def _new(directory: Path) -> tuple[Path, Path]:
    """Makes a place to work in; returns it, and the place of the log beside it."""
    own = Path(tempfile.mkdtemp(dir=directory))
    (own / "disk").mkdir()
    return own / "disk", own / "log"


def _stderr(base: Path) -> str:
    return base.with_name("log.stderr").read_text(errors="replace")


def _place(events: list[Event], plan: Plan) -> str:
    changes = [event for event in events if event.kind is not Kind.MARK]
    if plan.action is Action.FAIL:
        return next((str(event) for event in changes if event.was_forced), "nothing failed")
    return f"after {changes[-1]}" if changes else "before anything"


def _require_outcome(series: Series, status: int, said: Said, stderr: str) -> None:
    """The process died as planned, or lived; what it raised is what the disk said."""
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
