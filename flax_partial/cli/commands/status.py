"""`status`: what an unfinished checkpoint holds and lacks, once or until it is finished."""

import argparse
import time
from collections.abc import Iterator
from typing import Any

from flax_partial.cli import listing, places, text
from flax_partial.cli.output import BAD, FAINT, GOOD, STRONG, WAITING, Column, Output, Row, picked
from flax_partial.cli.places import Session
from flax_partial.errors import NoSessionError, first_few
from flax_partial.loading.catalog import is_finalized
from flax_partial.reports import SessionStatus

_COLUMNS = (
    Column("SAVED", is_number=True),
    Column("PROCESS", is_number=True, dispensable=2),
    Column("LEAVES", is_number=True, dispensable=3),
    Column("SIZE", is_number=True, dispensable=1),
    Column("HOLDS"),
)
_MOST_LISTED = 20
_REFRESH_SECS = 0.5
_MOST_BUSY = 0.2  # of the time, spent reading a session with many parts


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "Say what was saved into an unfinished checkpoint, and what it lacks."
    parser.add_argument("path", metavar="PATH")
    parser.add_argument(
        "--watch", action="store_true", help="go on until it is finalized, or dropped"
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Looks at a session; returns whether its parts conflict, or are damaged."""
    session = places.read_session(
        places.resolve(listing.one_checkpoint(options.path, out, places.UNFINISHED))
    )
    if options.watch:
        _watch(session, out)
        return False
    now = time.time()
    out.json(**_as_json(session))
    for line, style in (*_lines(session, now), ("", "")):
        out.line(line, style)
    out.table(_COLUMNS, _rows(session, now))
    return bool(session.plan.conflicts or session.status.damaged)


def _watch(session: Session, out: Output) -> None:
    if out.is_json or out.console is None:
        _follow(session, out)
    else:
        with out.redrawn(_COLUMNS) as draw:
            for state in _states(session):
                draw(_lines(state, time.time()), _rows(state, time.time()))
    final = session.where.final
    outcome = places.FINALIZED if is_finalized(final) else places.DROPPED
    out.json(path=final, state=outcome)
    out.line(f"{final} was {outcome}", GOOD if outcome == places.FINALIZED else BAD)


def _follow(session: Session, out: Output) -> None:
    """Writes a line whenever something has changed: for pipes."""
    last: dict[str, Any] = {}
    for state in _states(session):
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
    metadata = text.custom_metadata(status.custom_metadata)
    lacking = [session.lacking] if session.lacking else []
    lacking += first_few(plan.missing, most=_MOST_LISTED, count=len(plan.missing))
    conflicts = first_few(plan.conflicts, most=_MOST_LISTED, count=len(plan.conflicts))
    found = [(str(session.where.session), STRONG), (_summary(status, now), WAITING)]
    found += [(f"custom metadata: {metadata}", "")] if metadata else []
    found += [(f"not complete: {leaf}", WAITING) for leaf in lacking]
    found += [(f"at odds: {conflict}", BAD) for conflict in conflicts]
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
    lacking = [session.lacking] if session.lacking else []
    parts = [
        picked(part, "name", "process", "written_at", "bytes") | {"leaves": len(part.leaves)}
        for part in status.parts
    ]
    return {
        **picked(status, "path", "bytes", "processes", "custom_metadata", "torn", "damaged"),
        "state": places.UNFINISHED,
        "leaves": len(status.leaves),
        "lacking": [*lacking, *session.plan.missing],
        "conflicts": session.plan.conflicts,
        "parts": parts,
    }
