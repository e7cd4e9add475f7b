"""`prune`: removes a run's older checkpoints, after a question."""

import argparse

import flax_partial as fp
from flax_partial.cli import listing, places, text
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import BAD, Output

EXAMPLES = (
    "prune runs/lm --keep-last 3 --dry-run",
    "prune runs/lm --keep-last 3 --yes",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Remove the finalized checkpoints that are called by a step, but for those of the last "
        "steps. Unfinished ones, damaged ones and those with other names stay."
    )
    parser.add_argument("dir", metavar="DIR", help="the directory of a run")
    parser.add_argument(
        "--keep-last", type=int, metavar="N", required=True, help="how many of them stay"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Removes checkpoints; returns whether some stay: declined, or being read."""
    if options.keep_last < 1:
        raise WrongUseError(f"--keep-last is at least 1, not {options.keep_last}")
    directory = listing.directory(options.dir)
    found = [
        entry
        for entry in listing.entries(directory)
        if entry.state == places.FINALIZED and listing.step_in_name(entry.name) is not None
    ]
    doomed = found[: -options.keep_last]
    names = [entry.name for entry in doomed]
    size = text.size(sum(entry.bytes for entry in doomed))
    about = f"{' '.join(names) or 'nothing'} of {directory}: {size}"
    removed, problems = [], {}
    is_kept = bool(names and not (options.dry_run or options.yes)) and not out.is_agreed(
        about, "remove them"
    )
    for name in [] if options.dry_run or is_kept else names:
        try:
            fp.remove(directory / name)
            removed.append(name)
        except (fp.PartialCheckpointError, OSError) as error:
            problems[name] = str(error)
    out.json(directory=directory.absolute(), chosen=names, removed=removed, problems=problems)
    done = f"removed {' '.join(removed) or 'nothing'}"
    out.line(f"would remove {about}" if options.dry_run else done)
    for problem in problems.values():
        out.line(problem, BAD)
    return bool(problems) or is_kept
