"""Which checkpoints, and which of their leaves, a command is about. Pure."""

import argparse
import fnmatch
import re
from collections.abc import Sequence

from flax_partial.cli import text
from flax_partial.cli.errors import WrongUseError
from flax_partial.format.model import Leaf


def add_checkpoints(parser: argparse.ArgumentParser, *names: str) -> None:
    """Declares an argument for each finalized checkpoint that a command reads."""
    for name in names:
        described = "a finalized checkpoint; a run stands for its newest"
        parser.add_argument(name, metavar=name.upper(), help=described)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares `--only` and `--skip`."""
    for option, meaning in (
        ("--only", "only leaves and subtrees of this name; * stands for any text, dots too"),
        ("--skip", "all but leaves and subtrees of this name"),
    ):
        parser.add_argument(
            option, metavar="PATTERN", action="append", default=[], help=f"{meaning}; repeatable"
        )


def chosen(leaves: Sequence[Leaf], only: Sequence[str], skip: Sequence[str]) -> list[Leaf]:
    """Returns the leaves that `only` names and `skip` does not.

    Raises:
      WrongUseError: A pattern names nothing, or nothing is left.
    """
    named = {pattern: _named(pattern, leaves) for pattern in (*only, *skip)}
    for pattern, names in named.items():
        if not names:
            known = text.choices(pattern, _all_names(leaves))
            raise WrongUseError(f"no leaf or subtree is called {pattern!r}; there is {known}")
    names_of_all = {leaf.name for leaf in leaves}
    kept = set[str]().union(*(named[pattern] for pattern in only)) if only else names_of_all
    kept -= set[str]().union(*(named[pattern] for pattern in skip))
    if leaves and not kept:
        raise WrongUseError("--only and --skip leave nothing")
    return [leaf for leaf in leaves if leaf.name in kept]


def _all_names(leaves: Sequence[Leaf]) -> list[str]:
    """Returns the names of leaves and of the subtrees that they are in, the outer ones first."""
    paths = {leaf.texts[:depth] for leaf in leaves for depth in range(1, len(leaf.texts) + 1)}
    return [".".join(texts) for texts in sorted(paths, key=lambda texts: (len(texts), texts))]


def _named(pattern: str, leaves: Sequence[Leaf]) -> set[str]:
    """Returns the names that a pattern is, or stands for, and those inside of such a subtree."""
    expression = re.compile(rf"{fnmatch.translate(pattern)}|{fnmatch.translate(pattern + '.*')}")
    return {
        leaf.name
        for leaf in leaves
        if leaf.name == pattern
        or leaf.name.startswith(f"{pattern}.")
        or expression.match(leaf.name)
    }
