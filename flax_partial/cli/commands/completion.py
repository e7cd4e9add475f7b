"""`completion`: a script by which a shell completes commands, options and paths.

It is made of the parsers by `shtab`, and needs Python no more: a program that is asked at each key,
as argcomplete's are, would import JAX each time.
"""

import argparse
from collections.abc import Iterator

from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.errors import how_to_install

_SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "OUT", "SOURCE")
_DIRECTORIES = ("A", "B", "DIR", "PATH")
EXAMPLES = (
    "completion bash > ~/.local/share/bash-completion/completions/flax-partial",
    'completion zsh > "${fpath[1]}/_flax-partial"',
    "completion fish > ~/.config/fish/completions/flax-partial.fish",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Print a script by which a shell completes commands, options and paths. It is read by a "
        "new shell; made once, it has to be made again for a new version only."
    )
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help="bash, zsh or fish")


def run(options: argparse.Namespace, out: Output) -> bool:
    """Prints a script.

    Raises:
      WrongUseError: The package that makes it is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise WrongUseError(
            f"shtab, which makes the script, is not installed: {how_to_install('completion')}, or "
            "pip install shtab"
        ) from error
    for action in _arguments(options.parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    script = shtab.complete(options.parser, options.shell)
    out.json(shell=options.shell, script=script)
    out.raw(script)
    return False


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments of a parser and of its commands."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no public name for it
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                yield from _arguments(command)
