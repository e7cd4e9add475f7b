"""`status`: what an unfinished checkpoint holds and lacks, once or until it is finished."""

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, NoReturn

from flax_partial.cli import listing, places, text
from flax_partial.cli.output import BAD, FAINT, GOOD, STRONG, WAITING, Column, Output, Row, picked
from flax_partial.cli.places import Session
from flax_partial.errors import NoSessionError, first_few
from flax_partial.loading.catalog import is_finalized
from flax_partial.reports import SessionStatus
from flax_partial.storage.store_path import AnyPath

_COLUMNS = (
    Column("SAVED", is_number=True),
    Column("PROCESS", is_number=True, dispensable=2),
    Column("LEAVES", is_number=True, dispensable=3),
    Column("SIZE", is_number=True, dispensable=1),
    Column("HOLDS"),
)
_MOST_LISTED = 20
_REFRESH_SECS = 0.5
_WAIT_SECS = 0.1  # that a session may take to be seen
_MOST_BUSY = 0.2  # of the time, spent reading a session with many parts

EXAMPLES = (
    "status runs/lm/400",
    "status runs/lm --watch",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "Say what was saved into an unfinished checkpoint, and what it lacks."
    parser.add_argument(
        "path", metavar="PATH", help="an unfinished checkpoint; a run stands for its newest"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="go on until it is finalized, or dropped; of a run, follow one after the other until "
        "Ctrl-C",
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Looks at a session; returns whether its parts conflict, or are damaged."""
    if options.watch and listing.is_run(options.path):
        _watch_run(places.given(options.path), out)
    path = listing.one_checkpoint(options.path, out, places.UNFINISHED)
    session = places.read_session(places.resolve(path))
    if options.watch:
        _watch(session, out)
        return False
    now = time.time()
    out.json(**_as_json(session))
    for line, style in (*_lines(session, now), ("", "")):
        out.line(line, style)
    out.table(_COLUMNS, _rows(session, now))
    return bool(session.plan.conflicts or session.status.damaged)


def _watch_run(directory: AnyPath, out: Output) -> NoReturn:
    """Follows each session of a run, one after the other, and waits in between.

    Raises:
      NoSessionError: The directory is gone.
    """
    is_told = False
    while directory.is_dir():
        path = listing.newest_session(directory)
        if path is None:
            if not is_told:
                out.note(f"waiting for {directory} to begin its next checkpoint")
            is_told = True
            time.sleep(_WAIT_SECS)
            continue
        is_told = False
        with contextlib.suppress(NoSessionError):  # finalized or dropped meanwhile
            session = places.read_session(places.resolve(path))
            _watch(session, out, of_run=directory)
    raise NoSessionError(f"{directory} is gone")


def _watch(session: Session, out: Output, *, of_run: AnyPath | None = None) -> None:
    """Shows each state of a session until it has ended, or a newer one of its run has begun."""
    states = _states(session)
    if of_run is not None:
        shown = {None, of_run / session.where.session.name}
        states = takewhile(lambda _: listing.newest_session(of_run) in shown, states)
    if out.is_json or out.console is None:
        _follow(states, out)
    else:
        with out.redrawn(_COLUMNS) as draw:
            for state in states:
                draw(_lines(state, time.time()), _rows(state, time.time()))
    if session.where.is_session():
        return
    final = session.where.final
    outcome = places.FINALIZED if is_finalized(final) else places.DROPPED
    out.json(path=final, state=outcome)
    out.line(f"{final} was {outcome}", GOOD if outcome == places.FINALIZED else BAD)


def _follow(states: Iterable[Session], out: Output) -> None:
    """Writes a line whenever something has changed: for pipes."""
    last: dict[str, Any] = {}
    for state in states:
        described = _as_json(state) | {"torn": []}  # those of a save under way come and go
        if described != last:
            out.json(**described)
            out.line(_summary(state.status, time.time()))
        last = described


def _states(session: Session) -> Iterator[Session]:
    """Yields a session again and again, until it is finalized or dropped."""
    while True:
        yield session
        began = time.monotonic()
        try:
            session = places.read_session(session.where, session.parts)
        except NoSessionError:
            return
        took_secs = time.monotonic() - began
        time.sleep(max(_REFRESH_SECS, took_secs / _MOST_BUSY))


def _lines(session: Session, now: float) -> list[tuple[str, str]]:
    """What stands above the table, each line with its style."""
    status, plan = session.status, session.plan
    metadata = text.metadata(places.shown(status.custom_metadata), places.shown(status.training))
    missing = first_few(plan.missing, most=_MOST_LISTED, count=len(plan.missing))
    conflicts = first_few(plan.conflicts, most=_MOST_LISTED, count=len(plan.conflicts))
    found = [(str(session.where.session), STRONG), (_summary(status, now), WAITING)]
    found += [(line, "") for line in metadata]
    found += [(f"not complete: {leaf}", WAITING) for leaf in (*session.lacking, *missing)]
    found += [(f"conflict: {conflict}", BAD) for conflict in conflicts]
    found += [(f"damaged: {part}", BAD) for part in status.damaged]
    if status.torn:
        torn = text.counted(len(status.torn), "part")
        found.append((f"{torn} being written, or torn by a crash: not counted", FAINT))
    return found


def _summary(status: SessionStatus, now: float) -> str:
    if not status.parts:
        return f"{places.UNFINISHED}: nothing was saved yet"
    return (
        f"{places.UNFINISHED}: {text.counted(len(status.parts), 'part')}, "
        f"{text.leaves(len(status.leaves), status.bytes)}, "
        f"{text.counted(len(status.processes), 'process', 'processes')}, "
        f"last saved {text.age(now - status.parts[-1].written_at)}"
    )


def _rows(session: Session, now: float) -> list[Row]:
    return [
        Row(
            (
                text.age(now - part.written_at),
                str(part.process),
                f"{len(part.leaves):,}",
                text.size(part.bytes),
                text.name(text.common_prefix(part.leaves)),
            )
        )
        for part in session.status.parts
    ]


def _as_json(session: Session) -> dict[str, Any]:
    status = session.status
    parts = [
        picked(part, "name", "process", "written_at", "bytes") | {"leaves": len(part.leaves)}
        for part in status.parts
    ]
    return {
        **picked(status, "path", "bytes", "processes", "torn", "damaged"),
        "custom_metadata": places.shown(status.custom_metadata),
        "training": places.shown(status.training),
        "state": places.UNFINISHED,
        "leaves": len(status.leaves),
        "lacking": [*session.lacking, *session.plan.missing],
        "conflicts": session.plan.conflicts,
        "parts": parts,
    }
