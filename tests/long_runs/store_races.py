"""Several processes, each a thread here, that save into, finalize and abort one checkpoint at once.

    python tests/long_runs store_races 60
    python tests/long_runs store_races 60 's3://bucket/r{trial}?endpoint=http://...&region=r{me}'

Each is told from the others by a parameter of its URL, by which the package takes it for another
checkpoint; the objects are the same. Without a URL they race in memory.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from stores import another_process, memory

import flax_partial as fp

EXPECTED = (
    fp.CheckpointExistsError,
    fp.IncompleteCheckpointError,
    fp.NoSessionError,
)


@dataclass(frozen=True)
class Call:
    """What one of them has called.

    Attributes:
      begun: When, in seconds.
      ended: When it returned, or raised.
      kind: `save`, `finalize` or `abort`.
      leaf: What was saved.
      outcome: `ok`, or the name of the error.
    """

    begun: float
    ended: float
    kind: str
    leaf: str
    outcome: str


def race(url_of: Callable[[int], str], seed: int) -> list[Call]:
    """Lets some race each other; returns what they have called."""
    chance = random.Random(seed)  # noqa: S311
    calls: list[Call] = []

    def act(me: int, chance: random.Random) -> None:
        for number in range(chance.randint(2, 5)):
            time.sleep(chance.random() * chance.choice((0, 0.003, 0.01)))
            kinds = ("save",) * 5 + ("finalize",) * 2 + ("abort",) * chance.choice((0, 0, 1))
            kind, leaf = chance.choice(kinds), f"leaf{me}_{number}"
            state = {leaf: np.full(chance.choice((3, 2000)), me, np.float32)}
            does: dict[str, Callable[[], Any]] = {
                "save": lambda: fp.save(url_of(me), state),  # noqa: B023
                "finalize": lambda: fp.finalize(url_of(me)),
                "abort": lambda: fp.abort(url_of(me)),
            }
            begun, outcome = time.monotonic(), "ok"
            try:
                does[kind]()
            except EXPECTED as error:
                outcome = type(error).__name__
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
    """Asserts that what they were told holds."""
    allowed = {"ok", *(error.__name__ for error in EXPECTED)}
    odd = [call for call in calls if call.outcome not in allowed]
    assert not odd, odd
    done = [call for call in calls if call.outcome == "ok"]
    finalized = [call for call in done if call.kind == "finalize"]
    last_abort = max((call.ended for call in done if call.kind == "abort"), default=0.0)
    saved = {call.leaf for call in done if call.kind == "save"}
    due = {call.leaf for call in done if call.kind == "save" and call.begun > last_abort}
    assert len(finalized) <= 1, calls
    if not finalized:
        with contextlib.suppress(fp.NoSessionError, fp.IncompleteCheckpointError):
            fp.finalize(url)
    try:
        held = set(fp.load(url))
    except fp.NoSessionError:
        held = set()
        assert not finalized, calls
    assert due <= held, ("lost", due - held, calls)
    assert held <= saved, ("not acknowledged", held - saved, calls)


def main(seconds: float, url: str = "") -> None:
    end, seed, outcomes = time.monotonic() + seconds, 0, Counter[tuple[str, str]]()
    while time.monotonic() < end:
        another_process()
        template = url.replace("{trial}", f"{uuid.uuid4().hex}") or memory() + "?p={me}"

        def url_of(me: int, template: str = template) -> str:
            return template.replace("{me}", str(me))

        calls = race(url_of, seed)
        check(url_of(99), calls)
        outcomes.update((call.kind, call.outcome) for call in calls)
        seed += 1
    sys.stdout.write(f"{seed} trials held: {dict(outcomes)}\n")


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
