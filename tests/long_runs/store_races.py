"""Several processes, each a thread here, that save into, finalize, abort and remove one checkpoint.

    python tests/long_runs store_races 60
    python tests/long_runs store_races 60 --delays 0.01
    python tests/long_runs store_races 60 --delays 0.01 --kills 0.02
    python tests/long_runs store_races 60 's3://bucket/r{trial}?endpoint=http://...&region=r{me}'

Each is told from the others by a parameter of its URL, by which the package takes it for another
checkpoint; the objects are the same. Without a URL they race in memory. `--delays` sleeps for up to
so many seconds before and after some of their requests; `--kills` has such a share of the requests
that end a session, or remove a checkpoint, end their process instead, before or after.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from stores import Death, Killed, Request, another_process, memory, requests_through

import flax_partial as fp
from flax_partial.storage import control_objects, object_removal

EXPECTED = (
    fp.CheckpointExistsError,
    fp.IncompleteCheckpointError,
    fp.NoSessionError,
)
KILLED = "killed"
_ENDING = (".closing.", ".verdict", ".removed", "commit_success.txt", "contents.json")


@dataclass(frozen=True)
class Call:
    """What one of them has called.

    Attributes:
      begun: When, in seconds.
      ended: When it returned, or raised.
      kind: `save`, `finalize`, `abort` or `remove`.
      leaf: What was saved.
      outcome: `ok`, `KILLED`, or the name of the error.
    """

    begun: float
    ended: float
    kind: str
    leaf: str
    outcome: str


class Chaos:
    """Delays requests, and kills the processes that make some of them.

    Attributes:
      delay_secs: How long at most, before and after a request; three of ten are delayed.
      kill_share: Of how many requests that end a session or remove a checkpoint.
    """

    def __init__(self, seed: int, *, delay_secs: float, kill_share: float) -> None:
        self.delay_secs, self.kill_share = delay_secs, kill_share
        self._chance = random.Random(seed)  # noqa: S311

    def __call__(self, name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        self._sleep()
        kills = name in ("put", "put_new", "delete") and self._chance.random() < self.kill_share
        if kills and self._ends_something(name, arguments):
            return Death(1, after=self._chance.random() < 0.5)(name, arguments, request)
        try:
            return request()
        finally:
            self._sleep()

    def _ends_something(self, name: str, arguments: tuple[Any, ...]) -> bool:
        is_of_a_save = name == "put_new" and b'"void"' in arguments[2]
        return name == "delete" or (
            not is_of_a_save and any(one in arguments[1] for one in _ENDING)
        )

    def _sleep(self) -> None:
        if self._chance.random() < 0.3:
            time.sleep(self._chance.random() * self.delay_secs)


def race(url_of: Callable[[int], str], seed: int, *, removes: bool = False) -> list[Call]:
    """Lets some race each other; returns what they have called.

    Args:
      url_of: The URL by which a process knows the checkpoint.
      seed: What they do.
      removes: Whether they also remove what is finalized.
    """
    chance = random.Random(seed)  # noqa: S311
    calls: list[Call] = []

    def act(me: int, chance: random.Random) -> None:
        url = url_of(me)
        for number in range(chance.randint(2, 5)):
            time.sleep(chance.random() * chance.choice((0, 0.003, 0.01)))
            kinds = ("save",) * 5 + ("finalize",) * 2 + ("abort",) * chance.choice((0, 0, 1))
            kind = chance.choice(kinds + ("remove",) * (2 * removes))
            leaf = f"leaf{me}_{number}"
            state = {leaf: np.full(chance.choice((3, 2000)), me, np.float32)}
            does: dict[str, Callable[[], Any]] = {
                "save": lambda: fp.save(url, state),  # noqa: B023
                "finalize": lambda: fp.finalize(url),  # noqa: B023
                "abort": lambda: fp.abort(url),  # noqa: B023
                "remove": lambda: fp.remove(url),  # noqa: B023
            }
            begun, outcome = time.monotonic(), "ok"
            try:
                does[kind]()
            except EXPECTED as error:
                outcome = type(error).__name__
            except Killed:
                outcome = KILLED
                url = url_of(me + 100 * (number + 1))  # another process takes its place
            except BaseException as error:  # noqa: BLE001 - the caller says so
                outcome = repr(error)
            calls.append(Call(begun, time.monotonic(), kind, leaf, outcome))

    actors = [
        threading.Thread(target=act, args=(me, random.Random(chance.random())))  # noqa: S311
        for me in range(chance.choice((2, 4, 8)))
    ]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join()
    return calls


def check(url: str, calls: list[Call]) -> None:
    """Asserts that what they were told holds, and that the place can still be used."""
    allowed = {"ok", KILLED, *(error.__name__ for error in EXPECTED)}
    odd = [call for call in calls if call.outcome not in allowed]
    assert not odd, odd
    told = [call for call in calls if call.outcome == "ok"]
    perhaps = [call for call in calls if call.outcome == KILLED]
    removed = [call for call in told if call.kind == "remove"]
    drops = [call for call in told + perhaps if call.kind in ("abort", "remove")]
    finalized = [call for call in told if call.kind == "finalize"]
    saved = {call.leaf for call in told if call.kind == "save"}
    maybe = {call.leaf for call in perhaps if call.kind == "save"}
    dropped_at = max((call.ended for call in drops), default=0.0)
    due = {call.leaf for call in told if call.kind == "save" and call.begun > dropped_at}
    removed_at = max((call.begun for call in removed), default=0.0)
    gone = {call.leaf for call in told if call.kind == "save" and call.ended < removed_at}
    removals = sum(call.kind == "remove" for call in drops)
    assert len(finalized) <= 1 + removals, calls
    if not finalized or drops or perhaps:
        with contextlib.suppress(*EXPECTED):
            fp.finalize(url)
    held = held_by(url)
    assert held or removals or not finalized, calls
    assert due <= held, ("lost", due - held, calls)
    assert held <= saved | maybe, ("not acknowledged", held - saved, calls)
    assert not held & gone, ("removed", held & gone, calls)
    if not held:
        fp.save(url, {"next": 1})
        fp.finalize(url)
        assert held_by(url) == {"next"}


def held_by(url: str) -> set[str]:
    """What is in the checkpoint, which has to be whole; nothing where there is none."""
    try:
        report = fp.verify(url)
        assert report.ok, report.bad
        return set(fp.load(url))
    except fp.NoSessionError:
        return set()


@contextlib.contextmanager
def chaos(seed: int, *, delay_secs: float, kill_share: float) -> Iterator[None]:
    """Delays and kills, and has saves wait for no longer than a few requests take.

    So a save ends the round of a finalize that goes on. A removal is taken over from a process that
    was killed, and not from one that goes on: that is for long to have been stopped.
    """
    hook = Chaos(seed, delay_secs=delay_secs, kill_share=kill_share)
    patience = mock.patch.object(control_objects, "_PATIENCE_SECS", 4 * delay_secs)
    removal = mock.patch.object(object_removal, "_REMOVAL_SECS", 1.0 + 100 * delay_secs)
    with patience, removal, requests_through(hook):
        yield


@contextlib.contextmanager
def taken_over_at_once() -> Iterator[None]:
    """Has no process wait for those that have begun to end a session, or to remove a checkpoint."""
    patience = mock.patch.object(control_objects, "_PATIENCE_SECS", 0.0)
    removal = mock.patch.object(object_removal, "_secs_left", return_value=0.0)
    with patience, removal:
        yield


def one_trial(seed: int, template: str, *, delay_secs: float, kill_share: float) -> list[Call]:
    """Races once, and checks; `template` holds `{me}`."""

    def url_of(me: int) -> str:
        return template.replace("{me}", str(me))

    another_process()
    with chaos(seed, delay_secs=delay_secs, kill_share=kill_share):
        calls = race(url_of, seed, removes=bool(delay_secs))
    another_process()
    with taken_over_at_once():
        check(url_of(99), calls)
    return calls


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("url", nargs="?", default="")
    parser.add_argument("--delays", type=float, default=0.0)
    parser.add_argument("--kills", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    end, seed, outcomes = time.monotonic() + options.seconds, options.seed, Counter[Any]()
    while time.monotonic() < end:
        template = options.url.replace("{trial}", uuid.uuid4().hex) or memory() + "?p={me}"
        try:
            calls = one_trial(seed, template, delay_secs=options.delays, kill_share=options.kills)
        except AssertionError as error:
            error.add_note(f"--seed {seed}")
            raise
        outcomes.update((call.kind, call.outcome) for call in calls)
        seed += 1
    sys.stdout.write(f"{seed - options.seed} trials held: {dict(outcomes)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
