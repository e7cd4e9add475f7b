"""Cuts the power after every change that a process makes, and looks at what may be left.

    python tests/long_runs power --seed 0 --samples 8        half an hour on two cores

The last line says how many cuts were tried, and after how many of them everything held.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from disk import Tree
from fileops import Event

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import promises
import trials
from disk import Disk, read_tree, write_tree
from fileops import read_log
from nursery import Job, Nursery
from promises import Said, Then, require


@dataclass(frozen=True)
class Cut:
    """One cut of the power.

    Attributes:
      after: How many events came before it.
      place: The last of them, in words.
      said: What the process had said by then.
      tree: What is left on the disk.
      then: What is done with an unfinished checkpoint afterwards.
    """

    after: int
    place: str
    said: Said
    tree: Tree
    then: Then


def record(
    nursery: Nursery, directory: Path, *, durable: bool, work: str = "everything"
) -> tuple[str, list[Event]]:
    """Does the work unharmed; returns the directory it was done below, and all that it did.

    Raises:
      BrokenPromiseError: The record does not lead to the files that are there: it lacks something.
    """
    base, log = directory / "recorded", directory / "record"
    base.mkdir()
    status = nursery.run(Job(base, log, with_data=True, durable=durable, work=work))
    require(status == 0, "the work fails even where nothing does")
    events = read_log(log)
    disk = Disk(str(base))
    disk.replay(events)
    require(disk.tree() == read_tree(base), "the record does not lead to what is on the disk")
    shutil.rmtree(base)
    return str(base), events


def cuts(
    root: str, events: Sequence[Event], *, seed: int, samples: int, every: int = 1
) -> Iterator[Cut]:
    """Draws cuts: a few after each event, or each so many events, the same ones for a seed.

    The first of them leaves only what was fsynced.
    """
    disk = Disk(root)
    for number, event in enumerate(events):
        disk.apply(event)
        draw = random.Random(f"{seed} {number}")  # noqa: S311 - of cuts, not of secrets
        if number % every != seed % every:
            continue
        said = Said.of(events[: number + 1])
        seen = set()
        for sample in range(samples):
            tree = disk.after_cut(draw if sample else None)
            digest = _digest(tree)
            if digest not in seen:
                seen.add(digest)
                yield Cut(number + 1, str(event), said, tree, draw.choice(list(Then)))


def worst_cut(root: str, events: Sequence[Event], said: Said | None = None) -> Cut:
    """The cut after some events that leaves only what was fsynced."""
    disk = Disk(root)
    disk.replay(events)
    said = said or Said.of(events)
    return Cut(len(events), str(events[-1]), said, disk.after_cut(), Then.FINALIZE)


def _digest(tree: Tree) -> bytes:
    found = hashlib.blake2b(digest_size=16)

    def add(node: Tree) -> None:
        for name, inner in node.items():
            is_tree = isinstance(inner, dict)
            found.update(f"{name}\0{'' if is_tree else len(inner)}\0".encode())
            add(inner) if isinstance(inner, dict) else found.update(inner)
        found.update(b"\0\0")

    add(tree)
    return found.digest()


def hold(directory: Path, cut: Cut, check: Callable[[Path, Said, Then], object]) -> None:
    """Tries one cut below `directory`.

    Raises:
      BrokenPromiseError: Something that was promised does not hold; it says where.
    """
    base = Path(tempfile.mkdtemp(dir=directory))
    try:
        write_tree(cut.tree, base)
        check(base, cut.said, cut.then)
    except Exception as error:
        error.add_note(f"the power was cut after event {cut.after}, {cut.place}; then {cut.then}")
        raise
    finally:
        shutil.rmtree(base)


def main() -> int:
    """Tries them; prints a line for each after which something did not hold, and a summary."""
    options = trials.options(__doc__ or "", seed=0, samples=8, directory=None)
    logging.getLogger("flax_partial").setLevel(logging.CRITICAL)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name).resolve()
        nursery = Nursery(directory)
        root, events = record(nursery, directory, durable=True)
        nursery.close()
        drawn = cuts(root, events, seed=options.seed, samples=options.samples)
        checks = (("cut", functools.partial(hold, directory, cut, promises.check)) for cut in drawn)
        tried, held = trials.hold_all(checks)
    trials.say(
        f"seed {options.seed}, {len(events)} events: {tried.total()} cuts tried, {held.total()} "
        f"held, {time.monotonic() - begun:.0f} s"
    )
    return int(held != tried)


if __name__ == "__main__":
    sys.exit(main())
