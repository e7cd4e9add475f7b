"""Calls of the package in a process apart, which would be seen to hang, die or eat memory.

The process is forked from a server that has the package imported, and is used again until a call
ends it. Peak memory is counted from the beginning of each call.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from memory import forget_peak, status_bytes
from preloaded import started

TIMEOUT_SECS = 500.0  # less than a test has: how long a loaded machine takes is no failure
_MOST_ADDRESSES = 6 << 30  # beyond what the process has: a runaway ends there, not the machine


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
      value: What it returned.
      error: What it raised; an `EndedError` where it ended its process, or did not return.
      peak_bytes: Memory that the process held at most, beyond what it held before.
    """

    value: Any = None
    error: BaseException | None = None
    peak_bytes: int = 0


class EndedError(Exception):
    """The process died in the call, or had to be killed."""


class Isolated:
    """A process that makes calls for us; after one that ends it there is a new one."""

    def __init__(self) -> None:
        self._process: Any = None
        atexit.register(self.end)  # where the caller does not

    def call(self, function: Callable[..., Any], *arguments: Any) -> Outcome:
        """Calls a function of a module, in the other process."""
        if self._process is None:
            self._start()
        self._pipe.send((function, arguments))
        if not self._pipe.poll(TIMEOUT_SECS):
            stacks = Path(self._stacks.name).read_text()
            self.end()
            return Outcome(error=EndedError(f"no answer in {TIMEOUT_SECS} s:\n{stacks}"))
        try:
            outcome: Outcome = self._pipe.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self.end()
            return Outcome(error=EndedError(f"the process ended with {code}"))
        return outcome

    def value(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns there; it has to return."""
        outcome = self.call(function, *arguments)
        assert outcome.error is None, repr(outcome.error)
        return outcome.value

    def faults(
        self, most_bytes: int, function: Callable[..., list[str]], *arguments: Any
    ) -> list[str]:
        """The faults that a function finds; that it fails, or takes more memory, is one too."""
        outcome = self.call(function, *arguments)
        if outcome.error is not None:
            return [f"{type(outcome.error).__name__}: {outcome.error}"]
        if outcome.peak_bytes > most_bytes:
            return [f"it took {outcome.peak_bytes >> 20} MiB"]
        return list(outcome.value)

    def _start(self) -> None:
        self._stacks = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - closed by `end`
        self._process, self._pipe = started(_serve, self._stacks.name)

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._stacks.close()
            self._process = None


def _serve(stacks: str, pipe: Connection) -> None:
    warm_up()
    stacks_file = Path(stacks).open("w")  # noqa: SIM115 - until the process ends
    limit = status_bytes("VmSize") + _MOST_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            faulthandler.dump_traceback_later(TIMEOUT_SECS - 5, file=stacks_file)
            outcome = _measured(function, arguments)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(outcome)


def warm_up() -> None:
    """Starts JAX's backend, whose memory is no call's own."""
    import jax

    jax.devices()
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Outcome:
    forget_peak()
    before = status_bytes("VmHWM")
    value, error = None, None
    try:
        value = function(*arguments)
    except BaseException as caught:  # noqa: BLE001 - reported on the other side
        caught.__traceback__ = None
        error = caught
    return Outcome(value, error, status_bytes("VmHWM") - before)
