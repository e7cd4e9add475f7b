"""Many threads of several processes save, finalize, abort, read and list the same paths at once.

    python tests/long_runs stress --trials 20 --seed 0 --secs 10

With `--locks files` sessions are kept by control files, as where a file system has no locks.

Each operation is noted with the moments of its beginning and end, on the one clock of the machine,
and with its outcome. Afterwards all of it is held against a model of what is allowed:

- an operation ends in its result, or in an error that its documentation names for what went on;
- a path is finalized once; what is then there holds the saves that had returned before, whole, and
  none that failed, that an abort dropped, that a later one replaced, or that began afterwards;
- what was read in between is the same; and nothing else is left on disk.

Where the processes do not end in time, the stacks of all their threads are shown.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import trials
from preloaded import server

import flax_partial as fp

GRACE_SECS = 60.0
SAVES = ("save", "replace", "save_async")
QUICK = fp.SaveOptions(durable=False)
_KINDS = ("save",) * 6 + ("replace",) * 2 + ("save_async",) * 3 + ("status",) * 2 + ("load",) * 2
KINDS = (*_KINDS, "finalize", "finalize_async", "abort", "steps", "verify")
ERRORS: dict[str, tuple[type[Exception], ...]] = {
    **dict.fromkeys(("status", "load", "verify"), (fp.NoSessionError,)),
    # Without locks an abort does not wait for a finalize that has decided.
    "abort": (fp.NoSessionError, fp.CheckpointExistsError),
    **dict.fromkeys(SAVES, (fp.CheckpointExistsError, fp.NoSessionError)),
    **dict.fromkeys(
        ("finalize", "finalize_async"),
        (fp.CheckpointExistsError, fp.NoSessionError, fp.IncompleteCheckpointError),
    ),
    "steps": (),
}


@dataclass(frozen=True)
class Done:
    """An operation that has ended.

    Attributes:
      kind: What it was.
      name: Of which checkpoint.
      number: Its own number; what it saved is made of it.
      key: The leaf that it saved, if any.
      begun: When it began, in seconds.
      ended: When it ended.
      error: Name of the error that it raised, and what that says; empty for none.
      value: What it returned, in short.
    """

    kind: str
    name: str
    number: int
    key: str
    begun: float
    ended: float
    error: str
    value: Any = None

    @property
    def is_save(self) -> bool:
        return self.kind in SAVES


def state_of(key: str, number: int) -> dict[str, Any]:
    """What an operation saves: two leaves that belong together, of many sizes."""
    size = (3, 300, 40_000)[number % 3]
    return {key: {"array": np.full(size, number), "number": number}}


# --- in the processes -----------------------------------------------------------------------------


def work(  # noqa: PLR0917 - passed on as they are
    directory: Path, seed: int, threads: int, secs: float, current: Synchronized[int], locks: str
) -> None:
    """Does as much as it can in some seconds, and leaves its notes."""
    os.environ["FLAX_PARTIAL_LOCKS"] = locks
    stacks = (directory / f"stacks{seed}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    notes: list[Done] = []
    deadline = time.monotonic() + secs

    def run(thread: int) -> None:
        choose = random.Random(seed * 1000 + thread)  # noqa: S311 - of trials, not of secrets
        count = 0
        while time.monotonic() < deadline:
            count += 1
            number = (seed * 100 + thread) * 100_000 + count
            name = str(max(current.value - choose.choice((0, 0, 0, 0, 1, 2)), 0))
            notes.append(do(directory / "run", choose.choice(KINDS), name, number, seed))
            done = notes[-1]
            if done.kind.startswith("finalize") and not done.error:
                with current.get_lock():
                    current.value = max(current.value, int(name) + 1)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    (directory / f"notes{seed}").write_bytes(pickle.dumps(notes))


def do(directory: Path, kind: str, name: str, number: int, process: int) -> Done:
    """Does one operation, and notes what came of it."""
    key = f"shared{process}" if kind == "replace" else f"own{number}"
    begun, error, value = time.monotonic(), "", None
    try:
        value = _call(directory, kind, directory / name, key, number)
    except ERRORS[kind] as caught:
        error = f"{type(caught).__name__}: {caught}"
    except Exception as caught:  # noqa: BLE001 - no other may come: told below
        error = f"not allowed: {caught!r}"
    return Done(kind, name, number, key, begun, time.monotonic(), error, value)


def _call(directory: Path, kind: str, path: Path, key: str, number: int) -> Any:
    state = state_of(key, number)
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: fp.save(path, state, options=QUICK).part,
        "replace": lambda: fp.save(path, state, options=QUICK, replace=True).part,
        "save_async": lambda: fp.save_async(path, state, options=QUICK).result().part,
        "finalize": lambda: sorted(fp.finalize(path).leaves),
        "finalize_async": lambda: sorted(fp.finalize_async(path).result().leaves),
        "abort": lambda: fp.abort(path),
        "status": lambda: fp.status(path).leaves,
        "load": lambda: _read(path),
        "verify": lambda: dict(fp.verify(path).bad),
        "steps": lambda: fp.steps(directory),
    }
    return calls[kind]()


def _read(path: Path) -> dict[str, int]:
    """What a checkpoint holds: by key, the number that saved it. Both of its leaves must agree."""
    found = {}
    for key, leaves in fp.load(path).items():
        number = leaves["number"]
        whole = state_of(key, number)[key]["array"]
        assert np.array_equal(leaves["array"], whole), f"{key} is not what {number} saved"
        found[key] = number
    return found


# --- the model ------------------------------------------------------------------------------------


def faults_in(directory: Path, notes: list[Done]) -> list[str]:
    """Holds what was done, and what is on disk, against what is allowed."""
    faults = [f"{done.kind} {done.name}: {done.error}" for done in notes if "not al" in done.error]
    faults += [f"verify {d.name}: {d.value}" for d in notes if d.kind == "verify" and d.value]
    left = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    finalized = {name for name in left if name.isdecimal()}
    faults += [f"{name!r} is left" for name in left if not _is_expected(name, finalized)]
    listed = set(map(str, fp.steps(directory)))
    if listed != finalized:
        faults.append(f"steps are {listed}, not {finalized}")
    for name in sorted({done.name for done in notes}):
        mine = [done for done in notes if done.name == name]
        commits = [d for d in mine if d.kind.startswith("finalize") and not d.error]
        if len(commits) != (name in finalized):
            faults.append(f"{name} was finalized {len(commits)} times")
        elif commits:
            faults += [f"{name}: {fault}" for fault in _of_one(directory / name, mine, commits[0])]
    return faults


def _is_expected(name: str, finalized: set[str]) -> bool:
    number = name.removesuffix(".partial_save")
    return name in finalized or (number != name and number.isdecimal() and number not in finalized)


def _of_one(path: Path, notes: list[Done], commit: Done) -> list[str]:
    """Holds a finalized checkpoint against what was done to it."""
    content = _read(path)
    saves = [done for done in notes if done.is_save]
    aborts = [done for done in notes if done.kind == "abort" and not done.error]
    faults = [] if fp.verify(path).ok else ["verify finds damage"]
    for key, number in content.items():
        fault = _wrongly_there(number, saves, aborts, commit)
        if fault:
            faults.append(f"{key} of save {number} {fault}")
    faults += [
        f"{save.key} of save {save.number} is lost"
        for save in saves
        if save.key not in content and _is_lost(save, aborts, commit)
    ]
    faults += [f"save {d.number} began after the commit" for d in saves if _is_late(d, commit)]
    loads = [d for d in notes if d.kind == "load" and not d.error and d.value != content]
    return faults + [f"load {done.number} read something else" for done in loads]


def _wrongly_there(number: int, saves: list[Done], aborts: list[Done], commit: Done) -> str | None:
    """Why a checkpoint may not hold what a save saved."""
    save = next((save for save in saves if save.number == number), None)
    if save is None or save.error:
        return f"failed: {save}"
    if any(save.ended < one.begun and one.ended < commit.begun for one in aborts):
        return "was dropped"
    if any(_replaces(other, save) and other.ended < commit.begun for other in saves):
        return "was replaced"
    return None


def _is_lost(save: Done, aborts: list[Done], commit: Done) -> bool:
    """Whether a save must be in the checkpoint: no abort came between it and the commit."""
    if save.error or save.ended > commit.begun:
        return False
    return not any(one.ended > save.begun and one.begun < commit.ended for one in aborts)


def _replaces(other: Done, save: Done) -> bool:
    return not other.error and other.key == save.key and other.begun > save.ended


def _is_late(save: Done, commit: Done) -> bool:
    return not save.error and save.begun > commit.ended


# --- all of it ------------------------------------------------------------------------------------


def run(
    directory: Path, *, processes: int, threads: int, secs: float, seed: int, locks: str = "auto"
) -> tuple[int, list[str]]:
    """Lets processes loose on a directory; returns how much they did, and what was not allowed."""
    current = server().Value("i", 0)
    started = [
        server().Process(
            target=work, args=(directory, seed + number, threads, secs, current, locks)
        )
        for number in range(processes)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + secs + GRACE_SECS
    for process in started:
        process.join(max(deadline - time.monotonic(), 0))
    stuck = [process for process in started if process.exitcode is None]
    for process in stuck:
        os.kill(process.pid or 0, signal.SIGUSR1)
    time.sleep(bool(stuck))
    for process in stuck:
        process.kill()
        process.join()
    if stuck:
        return 0, ["stuck:\n" + file.read_text() for file in sorted(directory.glob("stacks*"))]
    codes = [process.exitcode for process in started]
    if any(codes):
        return 0, [f"processes ended with {codes}"]
    notes = [
        done
        for file in directory.glob("notes*")
        for done in pickle.loads(file.read_bytes())  # noqa: S301 - our own
    ]
    return len(notes), faults_in(directory / "run", notes)


def main() -> int:
    defaults = {
        "trials": 20,
        "seed": 0,
        "processes": 4,
        "threads": 16,
        "secs": 10.0,
        "locks": "auto",
    }
    options = trials.options(__doc__ or "", **defaults)
    total, held = 0, 0
    for trial in range(options.trials):
        with tempfile.TemporaryDirectory() as directory:
            seed = options.seed + trial * options.processes
            how = {"processes": options.processes, "threads": options.threads, "seed": seed}
            count, faults = run(Path(directory), **how, secs=options.secs, locks=options.locks)
        total += count
        held += not faults
        for fault in faults[:20]:
            trials.say(f"trial {trial}: {fault}")
    trials.say(
        f"{total} operations of {options.processes} processes with {options.threads} threads in "
        f"{options.trials} trials, {held} trials held; locks {options.locks}; seed {options.seed}"
    )
    return int(held != options.trials)


if __name__ == "__main__":
    sys.exit(main())
