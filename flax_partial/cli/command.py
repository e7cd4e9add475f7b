"""How a command is declared."""

import argparse
from collections.abc import Callable
from typing import Any

from flax_partial.cli.output import Output

Run = Callable[[argparse.Namespace, Output], bool]


def add_command(
    commands: Any,
    run: Run,
    name: str,
    *paths: str,
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    """Declares a command.

    Args:
      commands: Where to: what `add_subparsers` returned.
      run: Carries it out; returns whether it found a problem.
      name: Its name.
      paths: Names of its arguments, as its usage shows them; in the options they are small.
      summary: What it does, for the list of commands.
      description: What it does, for its own help.

    Returns:
      Its parser, for options of its own.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description
    )
    for path in paths:
        parser.add_argument(path.lower(), metavar=path)
    parser.add_argument("--json", action="store_true", help="write JSON; its shape: docs/cli.md")
    parser.set_defaults(run=run)
    return parser
