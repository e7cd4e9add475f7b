"""The engine in a process of its own, to be killed without warning.

Processes are forked from a server that has imported the package and run nothing of it: a new one
costs milliseconds. Only NumPy arrays are saved there, so that no JAX backend is started either.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from preloaded import started

import flax_partial as fp


class Worker:
    """A process that calls the package for us, one call after another."""

    def __init__(self) -> None:
        self._process, self._mine = started(_serve)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Returns what the package's function returns; raises what it raises."""
        self._mine.send((name, arguments, options))
        outcome = self._mine.recv()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def kill(self) -> None:
        """Ends the process as a power switch would, whatever it does."""
        self._process.kill()
        self._process.join()
        self._mine.close()

    def end(self) -> None:
        """Lets the process end."""
        self._mine.close()
        self._process.join()


def _serve(pipe: Connection) -> None:
    handles: dict[int, fp.SaveHandle] = {}
    while True:
        try:
            name, arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            answer = _answer(handles, name, *arguments, **options)
        except Exception as error:  # noqa: BLE001 - it is raised on the other side
            answer = error
        pipe.send(answer)


def _answer(handles: dict[int, fp.SaveHandle], name: str, *arguments: Any, **options: Any) -> Any:
    if name == "save_async":
        number = len(handles)
        handles[number] = fp.save_async(*arguments, **options)
        return number
    if name == "result":
        return handles[arguments[0]].result()
    return getattr(fp, name)(*arguments, **options)
