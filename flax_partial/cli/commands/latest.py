"""`latest`: the path of a run's newest checkpoint, for scripts."""

import argparse

import flax_partial as fp
from flax_partial.cli import listing
from flax_partial.cli.output import Output

EXAMPLES = ("latest runs/lm",)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = "Print the path of the finalized checkpoint of a run's last step."
    parser.add_argument("dir", metavar="DIR", help="the directory of a run")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Prints the path.

    Raises:
      IncompleteCheckpointError: There is none.
    """
    directory = listing.directory(options.dir)
    name = listing.newest(directory)
    if name is None:
        said = f"{directory} has no finalized checkpoint of a step"
        raise fp.IncompleteCheckpointError(said + listing.runs_in(directory))
    path = str(directory.absolute() / name)
    out.json(path=path)
    out.line(path)
    return False
