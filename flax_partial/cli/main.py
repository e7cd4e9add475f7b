"""The commands, their common options, and how a command ends: status and messages."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from flax_partial import __version__
from flax_partial.cli.commands import diff, export, finalize, ls, show, status, timeline, verify
from flax_partial.cli.errors import WrongUseError
from flax_partial.cli.output import Output
from flax_partial.cli.tables import printable
from flax_partial.errors import NoSessionError, PartialCheckpointError

PROGRAM = "flax-partial"
FINE, PROBLEM, WRONG_USE = 0, 1, 2
INTERRUPTED, PIPE_CLOSED, TERMINATED = (
    128 + number for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)
)

# In the order of the help. Each declares its commands with `add`.
_COMMANDS: tuple[ModuleType, ...] = (
    ls,
    show,
    status,
    verify,
    finalize,
    diff,
    export,
    timeline,
)


def run() -> NoReturn:
    """Runs the command that this process was started for, and ends the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w")  # noqa: SIM115 - closed: `>&-`
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    # An export that is told to stop takes its half file with it, a bar gives back the cursor.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Returns:
      0 if all is fine, 1 if it found a problem, 2 if it was used wrongly, 130 after Ctrl-C, 141 if
      whoever read its output stopped reading.
    """
    parser = _parser()
    try:
        parsed = parser.parse_args(arguments)
        if "run" not in parsed:
            parser.print_help(sys.stderr)
            return WRONG_USE
        out = Output(is_json=parsed.json)
        problem: bool = parsed.run(parsed, out)
        out.flush()
    except BrokenPipeError:
        _let_go_of_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (WrongUseError, NoSessionError) as error:
        return _failed(error, WRONG_USE)
    except (PartialCheckpointError, OSError) as error:
        return _failed(error, PROBLEM)
    return PROBLEM if problem else FINE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Look into checkpoints of flax_partial and of Orbax; end unfinished ones.",
        epilog="Exit status: 0 fine, 1 found a problem, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in _COMMANDS:
        module.add(commands)
    return parser


def _failed(error: Exception, status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:  # such as a full disk: the error that is told
        _let_go_of_stdout()
    with contextlib.suppress(BrokenPipeError):
        text = "\n".join(map(printable, str(error).split("\n")))
        print(f"{PROGRAM}: {text}", file=sys.stderr)  # noqa: T201
    return status


def _let_go_of_stdout() -> None:
    """Keeps Python from complaining, when it exits, of what it could not write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
