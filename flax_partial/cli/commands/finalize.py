"""`finalize`: makes an unfinished checkpoint a finalized one."""

import argparse

import flax_partial as fp
from flax_partial.cli import listing, places, text
from flax_partial.cli.output import GOOD, Output, picked
from flax_partial.runs import completeness

EXAMPLES = (
    "finalize runs/lm/400",
    "finalize runs/lm/400 --anyway",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Merge what was saved into one checkpoint: it appears complete, or not at all."
    )
    parser.add_argument("path", metavar="PATH", help="the unfinished checkpoint")
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="even if a run is still saving into it, or had not saved everything",
    )


def run(options: argparse.Namespace, out: Output) -> bool:
    """Finalizes a session."""
    session = places.read_session(listing.no_run(options.path, places.UNFINISHED))
    if not options.anyway:
        places.require_ended(session.where)
    if session.lacking and not options.anyway:
        step = completeness.recorded(session.status).get("step")
        raise fp.IncompleteCheckpointError(
            f"{session.where.session} (step {step}) is not complete: {session.lacking[0]}. A "
            "trainer could not resume from it. Abort it, or finalize what is there with --anyway."
        )
    done = fp.finalize(session.where.final)
    out.json(**picked(done, "path", "committed_at", "parts", "bytes"), leaves=len(done.leaves))
    amount = text.leaves(len(done.leaves), done.bytes)
    out.line(f"finalized {done.path}: {text.counted(done.parts, 'part')}, {amount}", GOOD)
    return False
