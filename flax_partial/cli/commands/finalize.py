"""`finalize` and `abort`: what ends an unfinished checkpoint."""

import argparse
import sys
import time
from typing import Any

from flax_partial.cli import places, text
from flax_partial.cli.command import add_command
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.cli.tables import BAD, GOOD
from flax_partial.errors import IncompleteCheckpointError
from flax_partial.finalizing import abort as aborting
from flax_partial.finalizing import finalize as finalizing


def add(commands: Any) -> None:
    """Declares the commands."""
    finalize = add_command(
        commands,
        run_finalize,
        "finalize",
        "PATH",
        summary="finish an unfinished checkpoint",
        description="Merge what was saved into one checkpoint: it appears complete, or not at all.",
    )
    finalize.add_argument(
        "--anyway",
        action="store_true",
        help="even if the callback that saves into it had not saved everything",
    )
    abort = add_command(
        commands,
        run_abort,
        "abort",
        "PATH",
        summary="drop an unfinished checkpoint",
        description="Drop an unfinished checkpoint, and only that.",
    )
    abort.add_argument("--yes", action="store_true", help="do not ask")


def run_finalize(options: argparse.Namespace, out: Output) -> bool:
    """Finalizes a session."""
    where = places.resolve(options.path)
    session = places.read_session(where)
    if not options.anyway:
        _require_complete(session)
    done = finalizing.finalize(where.final)
    out.json(
        {
            "path": str(done.path),
            "committed_at": done.committed_at,
            "parts": done.parts,
            "leaves": len(done.leaves),
            "bytes": done.bytes,
        }
    )
    amount = f"{text.leaves(len(done.leaves))}, {text.size(done.bytes)}"
    made = text.counted(done.parts, "part")
    out.line(f"finalized {done.path}: {made}, {amount}", GOOD)
    return False


def run_abort(options: argparse.Namespace, out: Output) -> bool:
    """Drops a session; returns whether whoever was asked said no."""
    where = places.resolve(options.path)
    session = places.read_session(where)
    is_wanted = options.yes or _ask(session, out)
    if is_wanted:
        aborting.abort(where.final)
    out.json({"path": str(where.final), "dropped": is_wanted, "parts": len(session.parts)})
    said = "dropped" if is_wanted else "kept"
    out.line(f"{said} {where.session}", "" if is_wanted else BAD)
    return not is_wanted


def _require_complete(session: places.Session) -> None:
    if session.lacking:
        raise IncompleteCheckpointError(
            f"{session.where.session} is not complete: {session.lacking}. A trainer could not "
            "resume from it. Abort it, or finalize what is there with --anyway."
        )


def _ask(session: places.Session, out: Output) -> bool:
    if not sys.stdin.isatty():
        raise WrongUseError("nobody can be asked here: pass --yes to drop it")
    size = text.size(session.status.bytes)
    parts = text.counted(len(session.parts), "part")
    written = ""
    if session.parts:
        written = f", last saved {text.age(time.time() - session.written_ns / 1e9)}"
    out.note(f"{session.where.session}: {parts}, {size}{written}")
    return out.ask("Drop it? [y/N] ").lower() in ("y", "yes")
