"""The program: its commands, their common option, exit statuses and error messages."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flax_partial import __version__
from flax_partial.cli import places, text
from flax_partial.cli.commands import (
    abort,
    completion,
    diff,
    export,
    finalize,
    import_,
    latest,
    ls,
    prune,
    rm,
    show,
    status,
    timeline,
    verify,
)
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output, printable
from flax_partial.errors import NoSessionError, PartialCheckpointError
from flax_partial.storage.paths import without_secrets

PROGRAM = "flax-partial"
FINE, PROBLEM, WRONG_USE = 0, 1, 2
INTERRUPTED, PIPE_CLOSED, TERMINATED = (
    128 + number for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)
)
_EXAMPLES = "examples:"
# In the order of the help: each command's name, module and summary.
_COMMANDS = (
    ("ls", ls, "list a run's checkpoints and unfinished sessions"),
    ("show", show, "show what is in a checkpoint, as a tree"),
    ("status", status, "look at an unfinished checkpoint"),
    ("verify", verify, "read all of a checkpoint, and check every digest"),
    ("finalize", finalize, "finish an unfinished checkpoint"),
    ("abort", abort, "drop an unfinished checkpoint"),
    ("latest", latest, "print the path of a run's newest checkpoint"),
    ("rm", rm, "remove a checkpoint"),
    ("prune", prune, "remove a run's older checkpoints"),
    ("diff", diff, "compare two checkpoints, leaf by leaf"),
    ("export", export, "write a checkpoint's arrays into a safetensors file"),
    ("import", import_, "make a checkpoint of safetensors files, or of Orbax's"),
    ("timeline", timeline, "draw what a run's checkpoints did when"),
    ("completion", completion, "print a script by which a shell completes commands"),
)


_LONGEST_COMMAND = 4 + max(len(name) for name, _, _ in _COMMANDS)  # and its indent


class _HelpFormatter(argparse.HelpFormatter):
    """Folds texts, and leaves examples as they are."""

    def add_argument(self, action: argparse.Action) -> None:
        """Adds an argument, and room for the names of commands, which are further to the right."""
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, _LONGEST_COMMAND)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """Shows no secret of a URL that stands at a place where there should be none."""

    def error(self, message: str) -> NoReturn:
        super().error(without_secrets(message))


def run() -> NoReturn:
    """Runs the command that this process was started for, and ends the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w")  # noqa: SIM115 - closed: `>&-`
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    # By an exception: `export` removes its unfinished file, a bar shows the cursor again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
      0 if all is fine, 1 if it found a problem, 2 if it was used wrongly, 130 after Ctrl-C, 141 if
      the reader of its output closed the pipe.
    """
    try:
        parser = new_parser()
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown:
            _refuse(unknown[0], parsed.command if "command" in parsed else parser)
        if "run" not in parsed:
            parser.print_help(sys.stderr)
            return WRONG_USE
        for name, value in vars(parsed).items():
            if isinstance(value, str):
                setattr(parsed, name, places.argument(value))
        has_problem: bool = parsed.run(parsed, Output(is_json=parsed.json))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (WrongUseError, NoSessionError) as error:
        return _failed(error, WRONG_USE)
    except (PartialCheckpointError, OSError) as error:
        return _failed(error, PROBLEM)
    return PROBLEM if has_problem else FINE


def new_parser() -> argparse.ArgumentParser:
    """Declares all commands."""
    parser = _Parser(
        prog=PROGRAM,
        description="Look into checkpoints of flax_partial and of Orbax; end unfinished ones.",
        epilog=_examples("ls runs/lm", "show runs/lm", "status runs/lm --watch", "show --help")
        + "\n\nexit status: 0 fine, 1 found a problem, 2 wrong use",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    as_json: dict[str, Any] = {"action": "store_true", "help": "write JSON; its shape: docs/cli.md"}
    parser.add_argument("--json", **as_json)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module, summary in _COMMANDS:
        command = commands.add_parser(
            name,
            help=summary,
            epilog=_examples(*module.EXAMPLES),
            formatter_class=_HelpFormatter,
        )
        module.add(command)
        command.add_argument("--json", **as_json, default=argparse.SUPPRESS)  # else: not given here
        command.set_defaults(run=module.run, parser=parser, command=command)
    return parser


def _refuse(argument: str, parser: argparse.ArgumentParser) -> NoReturn:
    """Ends the program, and names the option that is most like one that a parser does not have."""
    if not argument.startswith("-"):
        parser.error(f"{argument} is one argument too many")
    name = argument.partition("=")[0]
    actions = parser._actions  # noqa: SLF001 - argparse has no public name for it
    close = text.close(name, [each for action in actions for each in action.option_strings])
    parser.error(f"there is no option {name}" + (f"; there is {close[0]}" if close else ""))


def _examples(*calls: str) -> str:
    return "\n  ".join([_EXAMPLES, *(f"{PROGRAM} {call}" for call in calls)])


def _failed(error: Exception, exit_status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # such as a full disk: `error` already reports it
        _discard_stdout()
    with contextlib.suppress(BrokenPipeError):
        message = "\n".join(map(printable, str(error).split("\n")))
        print(f"{PROGRAM}: {message}", file=sys.stderr)  # noqa: T201
    return exit_status


def _discard_stdout() -> None:
    """Keeps Python from reporting, when it exits, what it could not write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
