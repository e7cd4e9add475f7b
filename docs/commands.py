"""Writes docs/reference/commands.md: the commands and arguments of `flax-partial`, from its help.

python docs/commands.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flax_partial.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parent / "reference" / "commands.md"

HEAD = """\
# Commands

`flax-partial COMMAND`, or `python -m flax_partial COMMAND`. [The command line](../cli.md) shows
what they say, what `--json` writes, and what exit statuses mean.

Each command has `--help`, and `--json` to write one line of JSON instead of text.
"""


def page() -> str:
    """The page as it should be."""
    return HEAD + "".join(map(section, commands()))


def commands() -> Iterator[argparse.ArgumentParser]:
    """The parser of each command."""
    for action in main.new_parser()._actions:  # noqa: SLF001 - argparse tells it to nobody
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            yield from action.choices.values()


def section(command: argparse.ArgumentParser) -> str:
    """A command: how it is called, what it does, its arguments, examples."""
    actions = [one for one in command._actions if one.dest not in ("help", "json")]  # noqa: SLF001
    paths = [called(one) for one in actions if not one.option_strings]
    name = (command.prog or "").split()[-1]
    call = " ".join([str(command.prog), *paths])
    text = f"\n## {name}\n\n`{call}`\n\n{command.description}\n"
    text += "\n| argument | |\n|---|---|\n" + "".join(map(row, actions))
    examples = "\n".join(line.strip() for line in str(command.epilog).splitlines()[1:])
    return text + f"\n<!-- not run: examples of calls -->\n```sh\n{examples}\n```\n"


def row(argument: argparse.Action) -> str:
    """A line of the table of arguments and options."""
    said = (argument.help or "") % vars(argument)
    return f"| `{called(argument)}` | {said.replace('*', chr(92) + '*')} |\n"


def called(argument: argparse.Action) -> str:
    """An argument as a call has it: `PATH`, `SOURCE...`, `--mode {min,max}`."""
    value = argument.metavar
    if value is None and argument.choices:
        value = "{" + ",".join(map(str, argument.choices)) + "}"
    texts = [*argument.option_strings, *([str(value)] if value else [])]
    return " ".join(texts) + ("..." if argument.nargs == argparse.ONE_OR_MORE else "")


if __name__ == "__main__":
    PAGE.write_text(page())
