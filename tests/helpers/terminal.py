"""Commands of the command line in processes of their own, on a terminal or into a pipe."""

from __future__ import annotations

import codecs
import errno
import fcntl
import functools
import os
import re
import struct
import sys
import termios
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyte
from preloaded import server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import ForkServerProcess

SECS = 60.0
SLOW_SECS = 0.05  # enough for a bar to be seen


class Terminal:
    """What a command shows on a terminal, and the keys that are pressed there."""

    def __init__(self, master: int, process: ForkServerProcess, width: int, height: int) -> None:
        self._master = master
        self._process = process
        self._width = width
        self._height = height
        self.shown = ""
        self.pieces: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def pid(self) -> int:
        """Of the command's process."""
        assert self._process.pid is not None
        return self._process.pid

    def wait_for(self, text: str) -> str:
        """Reads until a text was shown; returns all that was."""
        while text not in self.shown:
            assert self._read(), f"it ended without {text!r}: {self.shown}"
        return self.shown

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """Reads until the command ends; returns its exit status."""
        while self._read():
            pass
        self._process.join(SECS)
        assert self._process.exitcode is not None
        return self._process.exitcode

    def lines(self) -> list[str]:
        """What was shown, without colours and movements of the cursor."""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown)
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain)]

    def screens(self) -> list[list[str]]:
        """What the screen looked like after each piece of output: its lines that hold anything."""
        screen = pyte.Screen(self._width, self._height)
        stream = pyte.Stream(screen)
        seen: list[list[str]] = []
        for piece in self.pieces:
            stream.feed(piece)
            lines = [line.rstrip() for line in screen.display if line.strip()]
            if not seen or lines != seen[-1]:
                seen.append(lines)
        return seen

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # the command has ended
                raise
            return False
        piece = self._decoder.decode(data)
        self.shown += piece
        self.pieces.append(piece)
        return bool(data)


@contextmanager
def on_terminal(
    *arguments: object, width: int = 100, height: int = 30, slow_secs: float = 0
) -> Iterator[Terminal]:
    """Runs a command on a terminal of this size; a slow one waits each time it writes or reads."""
    run = functools.partial(_run, [*map(str, arguments)], slow_secs)
    with running_on_terminal(run, width=width, height=height) as terminal:
        yield terminal


@contextmanager
def running_on_terminal(
    work: Callable[[], object], *, width: int = 100, height: int = 30
) -> Iterator[Terminal]:
    """Calls a function, which can be pickled, in a process on a terminal of this size."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    name = os.ttyname(slave)
    process = server().Process(target=_on_tty, args=(name, work))
    process.start()
    terminal = Terminal(master, process, width, height)
    try:
        # The slave stays open until the command has it: else reading would fail meanwhile.
        terminal.wait_for(_READY)
        os.close(slave)
        terminal.shown = terminal.shown.partition(_READY)[2]  # it may have gone on meanwhile
        terminal.pieces = [terminal.shown]
        yield terminal
    finally:
        process.kill()
        process.join()
        os.close(master)


_READY = "\x05"


def _on_tty(name: str, work: Callable[[], object]) -> None:
    os.login_tty(os.open(name, os.O_RDWR))
    os.write(1, _READY.encode())
    os.environ |= {"TERM": "xterm-256color"}
    for variable in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        os.environ.pop(variable, None)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    work()


def into_closed_pipe(*arguments: object) -> tuple[int, str]:
    """Runs a command whose reader has gone; returns its exit status, and what it complained of."""
    read, write = os.pipe()
    os.close(read)
    try:
        return into(f"/proc/{os.getpid()}/fd/{write}", *arguments)
    finally:
        os.close(write)


def into(out: str, *arguments: object) -> tuple[int, str]:
    """Runs a command that writes to a file; returns its exit status, and what it complained of."""
    read, write = os.pipe()
    names = [out, f"/proc/{os.getpid()}/fd/{write}"]
    process = server().Process(target=_on_files, args=(names, [*map(str, arguments)]))
    process.start()
    process.join(SECS)
    os.close(write)
    with os.fdopen(read) as errors:
        assert process.exitcode is not None
        return process.exitcode, errors.read()


def _on_files(names: list[str], arguments: list[str]) -> None:
    for descriptor, name in enumerate(names, start=1):
        os.dup2(os.open(name, os.O_WRONLY), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    _run(arguments)


def _run(arguments: list[str], slow_secs: float = 0) -> None:
    from flax_partial.cli import main, pieces
    from flax_partial.loading import batches

    def slowed(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*passed: object, **named: object) -> object:
            time.sleep(slow_secs)
            return function(*passed, **named)

        return wrapper

    def slow_after_each(*passed: Any, **named: Any) -> Iterator[object]:
        for batch in batches.batches(*passed, **named):
            yield batch
            time.sleep(slow_secs)

    if slow_secs and arguments[0] == "import":  # after each part
        pieces.batches = slow_after_each  # type: ignore[assignment]
    elif slow_secs:
        os.pwrite = slowed(os.pwrite)  # type: ignore[assignment]
        batches.region_bytes = slowed(batches.region_bytes)  # type: ignore[assignment]
    sys.argv[1:] = arguments
    main.run()
