"""The engine in a process of its own, to be killed without warning.

Processes are forked from a server that has imported the package and run nothing of it: a new one
costs milliseconds. Only NumPy arrays are saved there, so that no JAX backend is started either.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from preloaded import server

import flax_partial as fp
from flax_partial.storage import checkpoint_dir, files, session_dir
from flax_partial.storage import tensorstore_io as arrays

_CHANGES = frozenset(("os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlsym"))


class Worker:
    """A process that calls the package for us, one call after another."""

    def __init__(self) -> None:
        self._mine, theirs = server().Pipe()
        self._process = server().Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

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


def run_and_die(call: str, path: str, state: Any, event: int) -> bool:
    """Calls the package in a new process, which is killed at the given event.

    An event is the beginning or the end of a function of `storage` or `arrays` before which
    something may have changed on disk since the last event.

    Returns:
      Whether it was killed; False where it ended before the event came.
    """
    process = server().Process(target=_die_at, args=(call, path, state, event))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def _die_at(call: str, path: str, state: Any, event: int) -> None:
    left, is_changed = event, True

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal is_changed
        is_write = name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        is_changed = is_changed or name in _CHANGES or bool(is_write)

    def tick(*, is_change: bool) -> None:
        nonlocal left, is_changed
        if not (is_changed or is_change):
            return
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left, is_changed = left - 1, False

    sys.addaudithook(watch)
    for module in (files, session_dir, checkpoint_dir, arrays):
        for name, function in vars(module).copy().items():
            is_own = getattr(function, "__module__", None) == module.__name__
            if isinstance(function, types.FunctionType) and is_own:
                setattr(module, name, _ticking(function, tick, module is arrays))
    function = getattr(fp, call)
    if state is None:
        function(path)
    else:
        function(path, state, replace=True, custom_metadata={"second": True})


def _ticking(
    function: types.FunctionType,
    tick: Callable[..., None],
    is_database: bool,  # noqa: FBT001
) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        tick(is_change=False)
        outcome = function(*arguments, **options)
        tick(is_change=is_database and function.__name__ in ("write_part", "merge_parts"))
        return outcome

    return wrapped
