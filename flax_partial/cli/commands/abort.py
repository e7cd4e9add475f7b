"""`abort`: drops an unfinished checkpoint, after a question."""

import argparse
import time

import flax_partial as fp
from flax_partial.cli import listing, places, text
from flax_partial.cli.output import BAD, Output

EXAMPLES = (
    "abort runs/lm/400",
    "abort runs/lm/400 --yes",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "Drop an unfinished checkpoint, and only that."
    parser.add_argument("path", metavar="PATH", help="the unfinished checkpoint")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--anyway", action="store_true", help="even if a run is still training in its directory"
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Drops a session; returns whether the answer was no."""
    where = listing.no_run(options.path, places.UNFINISHED)
    session = places.read_session(where)
    if not options.anyway:
        places.require_ended(where)
    is_wanted = options.yes or out.is_agreed(_described(session), "drop it")
    if is_wanted:
        fp.abort(where.final)
    out.json(path=where.final, dropped=is_wanted, parts=len(session.parts))
    out.line(f"{'dropped' if is_wanted else 'kept'} {where.session}", "" if is_wanted else BAD)
    return not is_wanted


def _described(session: places.Session) -> str:
    status = session.status
    about = f"{session.where.session}: {text.counted(len(status.parts), 'part')}"
    about += f", {text.size(status.bytes)}"
    if status.parts:
        about += f", last saved {text.age(time.time() - status.parts[-1].written_at)}"
    return about
