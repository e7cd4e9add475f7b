"""`status`: what an unfinished checkpoint holds and lacks, once or until it is finished."""

import argparse
import time
from collections.abc import Iterator, Sequence
from typing import Any

from flax_partial.cli import places, text
from flax_partial.cli.command import add_command
from flax_partial.cli.output import Output
from flax_partial.cli.places import Session
from flax_partial.cli.tables import BAD, FAINT, GOOD, STRONG, WAITING, Column, Row, Table
from flax_partial.errors import NoSessionError, first_few
from flax_partial.loading import catalog
from flax_partial.reports import SessionStatus
from flax_partial.storage.local import CheckpointPath

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


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        run,
        "status",
        "PATH",
        summary="look at an unfinished checkpoint",
        description="Say what was saved into an unfinished checkpoint, and what it lacks.",
    )
    parser.add_argument(
        "--watch", action="store_true", help="go on until it is finalized, or dropped"
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Looks at a session; returns whether its parts are at odds."""
    where = places.resolve(options.path)
    session = places.read_session(where)
    if not options.watch:
        _say(session, out)
        return bool(session.plan.conflicts)
    watch = _follow if out.is_json or out.console is None else _draw
    watch(session, out)
    return False


def _say(session: Session, out: Output) -> None:
    out.json(_as_json(session))
    for line, style in (*_lines(session, time.time()), ("", "")):
        out.line(line, style)
    out.table(_table(session, time.time()))


def _follow(session: Session, out: Output) -> None:
    """Writes what there is whenever it has changed: for pipes."""
    last: dict[str, Any] = {}
    for now in _states(session):
        described = _as_json(now) | {"torn": []}  # those of a save on its way come and go
        if described != last:
            out.json(described)
            out.line(_summary(now.status, time.time()))
            out.flush()
        last = described
    _say_end(session.where, out)


def _draw(session: Session, out: Output) -> None:
    with out.redrawn() as draw:
        for now in _states(session):
            draw(_lines(now, time.time()), _table(now, time.time()))
    _say_end(session.where, out)


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


def _say_end(where: CheckpointPath, out: Output) -> None:
    is_finalized = catalog.is_finalized(where.final)
    state = places.FINALIZED if is_finalized else places.DROPPED
    out.json({"path": str(where.final), "state": state})
    out.line(f"{where.final} was {state}", GOOD if is_finalized else BAD)


def _lines(session: Session, now: float) -> list[tuple[str, str]]:
    """What stands above the table, each line with its style."""
    status, plan = session.status, session.plan
    found = [
        (str(session.where.session), STRONG),
        (_summary(status, now), WAITING),
    ]
    metadata = text.custom_metadata(status.custom_metadata)
    if metadata:
        found.append((f"custom metadata: {metadata}", ""))
    if session.lacking:
        found.append((f"not complete: {session.lacking}", WAITING))
    found += [(f"not complete: {leaf}", WAITING) for leaf in _first(plan.missing)]
    found += [(f"at odds: {conflict}", BAD) for conflict in _first(plan.conflicts)]
    if status.torn:
        torn = text.counted(len(status.torn), "part")
        found.append((f"{torn} being written, or torn by a crash: not counted", FAINT))
    return found


def _summary(status: SessionStatus, now: float) -> str:
    if not status.parts:
        return f"{places.UNFINISHED}: nothing was saved yet"
    last = max(part.written_at for part in status.parts)
    return (
        f"{places.UNFINISHED}: {text.counted(len(status.parts), 'part')}, "
        f"{text.leaves(len(status.leaves))}, {text.size(status.bytes)}, "
        f"{text.counted(len(status.processes), 'process', 'processes')}, "
        f"last saved {text.age(now - last)}"
    )


def _first(lines: Sequence[str]) -> list[str]:
    return first_few(lines, most=_MOST_LISTED, count=len(lines))


def _table(session: Session, now: float) -> Table:
    return Table(
        _COLUMNS,
        [
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
        ],
    )


def _as_json(session: Session) -> dict[str, Any]:
    status = session.status
    lacking = [session.lacking] if session.lacking else []
    return {
        "path": str(status.path),
        "state": places.UNFINISHED,
        "leaves": len(status.leaves),
        "bytes": status.bytes,
        "processes": list(status.processes),
        "custom_metadata": status.custom_metadata,
        "lacking": [*lacking, *session.plan.missing],
        "conflicts": list(session.plan.conflicts),
        "torn": list(status.torn),
        "parts": [
            {
                "name": part.name,
                "process": part.process,
                "written_at": part.written_at,
                "leaves": len(part.leaves),
                "bytes": part.bytes,
            }
            for part in status.parts
        ],
    }
