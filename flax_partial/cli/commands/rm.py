"""`rm`: removes a finalized checkpoint, after a question."""

import argparse

import flax_partial as fp
from flax_partial.cli import listing, places, text
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import BAD, Output
from flax_partial.loading.catalog import is_finalized
from flax_partial.storage import files
from flax_partial.storage.places import names_session

EXAMPLES = (
    "rm runs/lm/100",
    "rm runs/lm/100 --yes",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Remove a finalized checkpoint, unless it is being read. For an unfinished one there "
        "is abort."
    )
    parser.add_argument("path", metavar="PATH", help="the finalized checkpoint")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Removes a checkpoint; returns whether the answer was no."""
    listing.no_run(options.path, places.FINALIZED)
    final = places.finalized(options.path).final
    if names_session(options.path) or not is_finalized(final):
        raise WrongUseError(f"there is no finalized checkpoint at {options.path}")
    size = files.bytes_below(final)
    is_wanted = options.yes or out.is_agreed(f"{final}: {text.size(size)}", "remove it")
    if is_wanted:
        fp.remove(final)
    out.json(path=final, removed=is_wanted, bytes=size)
    out.line(f"{'removed' if is_wanted else 'kept'} {final}", "" if is_wanted else BAD)
    return not is_wanted
