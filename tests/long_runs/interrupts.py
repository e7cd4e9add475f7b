"""Interrupts each call wherever Python lets a signal in: afterwards all goes on as before.

    python tests/long_runs interrupts --trials 5000 --seed 0

First a `KeyboardInterrupt` comes at every point of the package's code at which CPython looks for
signals, one a call; then, as often as asked for, a real SIGINT at a random moment. Then the same
path is saved into and finalized, which must neither wait for ever nor lose anything that was saved
before; what was interrupted has happened whole, or not at all.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import itertools
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import trees
import trials
from isolated import Isolated
from things import QUICK, stored

import flax_partial as fp
from flax_partial.sessions import workers

FIRST = {"first": np.arange(3), "text": "first"}
SECOND = {"second": {"w": np.arange(40_000), "b": 2}}
THIRD = {"third": 3}
PACKAGE = str(Path(fp.__file__).parent)


CALLS: dict[str, Callable[[Path], object]] = {
    "save": lambda path: fp.save(path, SECOND, options=QUICK),
    "replace": lambda path: fp.save(path, SECOND, options=QUICK, replace=True),
    "save_async": lambda path: fp.save_async(path, SECOND, options=QUICK).result(),
    "share": lambda path: fp.save(path, SECOND, options=QUICK, reuse=path.with_name("earlier")),
    "finalize": fp.finalize,
    "finalize_async": lambda path: fp.finalize_async(path).result(),
    "abort": fp.abort,
}


def make_earlier(directory: Path) -> None:
    """Makes the checkpoint that `share` shares data with, if it is not there."""
    if not (directory / "earlier").exists():
        stored(directory / "earlier", SECOND)


# After these instructions CPython looks for signals, and after no others.
_CHECKED = frozenset(
    dis.opmap[name]
    for name in ("RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD")
    if name in dis.opmap
)


@functools.cache
def _points(code: CodeType) -> frozenset[int]:
    """Offsets of instructions before which a signal may raise, with the handlers it would meet.

    It raises in the instruction before. Where that one has other handlers it is left out: what is
    raised by a tracing function meets those of the instruction that follows.
    """
    handlers = [
        (entry.start, entry.end, entry.target)
        for entry in dis._parse_exception_table(code)  # type: ignore[attr-defined] # noqa: SLF001
    ]

    def handler(offset: int) -> int | None:
        return next((t for start, end, t in handlers if start <= offset < end), None)

    instructions = list(dis.get_instructions(code))
    return frozenset(
        after.offset
        for before, after in itertools.pairwise(instructions)
        if before.opcode in _CHECKED and handler(before.offset) == handler(after.offset)
    )


def _is_ours(code: CodeType) -> bool:
    # What comes within __del__ Python itself swallows.
    return code.co_filename.startswith(PACKAGE) and code.co_name != "__del__"


@contextlib.contextmanager
def _traced(reach: Callable[[], None]) -> Iterator[None]:
    """Calls `reach` at each point that this thread comes to."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not _is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in _points(frame.f_code):
            reach()
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def _monitored(reach: Callable[[], None]) -> Iterator[None]:
    """The same by `sys.monitoring`: from 3.13 on a tracing function does not see every point."""
    monitoring, tool, caller = sys.monitoring, sys.monitoring.DEBUGGER_ID, threading.get_ident()

    def look(code: CodeType, offset: int) -> Any:
        if not _is_ours(code) or offset not in _points(code):
            return monitoring.DISABLE
        if threading.get_ident() == caller:
            reach()
        return None

    monitoring.use_tool_id(tool, "interrupts")
    monitoring.register_callback(tool, monitoring.events.INSTRUCTION, look)
    monitoring.set_events(tool, monitoring.events.INSTRUCTION)
    try:
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


def interrupted(call: Any, path: Path, at: int) -> bool:
    """Makes a call that is interrupted at a point; returns whether it has that many."""
    left = at

    def reach() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    with (_monitored if sys.version_info >= (3, 12) else _traced)(reach):
        try:
            call(path)
        except KeyboardInterrupt:
            return True
    return False


def end_workers() -> None:
    """Has workers end that wait for work: a call that meets one takes another way."""
    workers.release_idle()
    while threading.active_count() > 1:
        time.sleep(1e-5)


def go_on(path: Path, kept: Iterable[str]) -> None:
    """Uses the path as if nothing had been; fails where that does not work, or `kept` is lost."""
    while workers.saving.unfinished or workers.finalizing.unfinished:  # that goes on
        time.sleep(1e-4)
    if path.exists():
        assert_whole(path, *kept)
        return
    try:
        fp.save(path, THIRD, options=QUICK)
        is_there = "second.b" in fp.status(path).leaves  # if not, nor is it claimed
        fp.save(path, SECOND, options=QUICK, replace=is_there)
        fp.finalize(path)
    except fp.CheckpointExistsError:  # by a thread that had not even begun above
        assert_whole(path, *kept)
    else:
        assert_whole(path, *kept, *SECOND, *THIRD)


def assert_whole(path: Path, *names: str) -> None:
    there = fp.load(path).keys()
    assert there >= {*names}
    wanted = {**FIRST, **SECOND, **THIRD}
    trees.assert_whole(path, {name: wanted[name] for name in there})
    assert gc.isenabled()


# --- in a process apart ---------------------------------------------------------------------------


def sweep(name: str, directory: Path, first: int, step: int) -> tuple[int, list[str]]:
    """Interrupts a call at every `step`-th point; returns how many there were, and what failed."""
    faults = []
    make_earlier(directory)
    for tried in itertools.count():
        path = directory / f"{name}{first}.{tried}"
        fp.save(path, FIRST, options=QUICK)
        end_workers()
        was_interrupted = interrupted(CALLS[name], path, first + tried * step)
        fault = fault_of(name, path)
        if fault:
            faults.append(f"{name} at {first + tried * step}: {fault}")
        shutil.rmtree(path, ignore_errors=True)
        if not was_interrupted:
            return tried, faults
    raise AssertionError


def signalled(directory: Path, seed: int) -> list[str]:
    """Interrupts a call by a signal at a random moment; returns what failed afterwards."""
    choose = random.Random(seed)  # noqa: S311 - of trials, not of secrets
    name = choose.choice(list(CALLS))
    path = directory / f"signal{seed}"
    make_earlier(directory)
    fp.save(path, FIRST, options=QUICK)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-6, 6e-3))
            CALLS[name](path)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    fault = fault_of(name, path)
    shutil.rmtree(path, ignore_errors=True)
    return [f"{name}: {fault}"] if fault else []


def fault_of(name: str, path: Path) -> str:
    """What is wrong after a call was interrupted, if anything."""
    try:
        go_on(path, () if name == "abort" else FIRST)
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return f"{type(error).__name__}: {error}"
    return ""


def start(directory: Path) -> Callable[[int], tuple[str, list[str]]]:
    """Interrupts everywhere; then returns what does so at a random moment."""
    apart = Isolated()
    for name in CALLS:
        outcome = apart.call(sweep, name, directory, 0, 1)
        points, faults = outcome.value or (0, [repr(outcome.error)])
        trials.say(f"{name}: {points} points, {points - len(faults)} held")
        for fault in faults:
            trials.say(f"  {fault}")

    def trial(seed: int) -> tuple[str, list[str]]:
        outcome = apart.call(signalled, directory, seed)
        return "signal", outcome.value if outcome.error is None else [repr(outcome.error)]

    return trial


if __name__ == "__main__":
    sys.exit(trials.run(__doc__, start, trials=5_000))
