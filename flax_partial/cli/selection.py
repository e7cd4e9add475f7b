"""Which leaves a command is about: patterns over their names. Pure."""

import argparse
import fnmatch
import re
from collections.abc import Callable, Sequence

from flax_partial.cli.errors import WrongUseError
from flax_partial.format.model import Leaf


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares `--only` and `--skip`."""
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="only leaves and subtrees of this name; * stands for any text, dots too; repeatable",
    )
    parser.add_argument(
        "--skip",
        metavar="PATTERN",
        action="append",
        default=[],
        help="all but leaves and subtrees of this name; repeatable",
    )


def chosen(leaves: Sequence[Leaf], only: Sequence[str], skip: Sequence[str]) -> list[Leaf]:
    """Returns the leaves that `only` names and `skip` does not.

    Raises:
      WrongUseError: A pattern names nothing, or nothing is left.
    """
    for pattern in (*only, *skip):
        if not any(map(_matcher(pattern), leaves)):
            example = f"; a name is {leaves[0].name!r}" if leaves else ""
            raise WrongUseError(f"no leaf or subtree is called {pattern!r}{example}")
    wanted, unwanted = [*map(_matcher, only)], [*map(_matcher, skip)]
    found = [
        leaf
        for leaf in leaves
        if (not wanted or any(match(leaf) for match in wanted))
        and not any(match(leaf) for match in unwanted)
    ]
    if leaves and not found:
        raise WrongUseError("--only and --skip leave nothing")
    return found


def _matcher(pattern: str) -> Callable[[Leaf], bool]:
    """Tells whether a pattern is, or stands for, the name of a leaf or of a subtree with it."""
    expression = re.compile(fnmatch.translate(pattern))
    inside = re.compile(fnmatch.translate(pattern + ".*"))

    def match(leaf: Leaf) -> bool:
        name = leaf.name
        return bool(
            name == pattern
            or name.startswith(pattern + ".")
            or expression.match(name)
            or inside.match(name)
        )

    return match
