"""The power is cut after some change, and a disk is left that keeps only what was fsynced.

A sample of the cuts that `power.py` tries, the same one in every run. What is recorded happens on a
real disk, where there is one below the temporary directory: around the page cache, as users do it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import power
import promises
import workload
from nursery import Nursery
from promises import BrokenPromiseError, Said, Then, merged, require, same
from workload import FIRST, SAVES

import flax_partial as fp


def test_durable_saves_and_checkpoints_outlive_a_power_cut(
    nursery: Nursery, tmp_path: Path
) -> None:
    root, events = power.record(nursery, tmp_path, durable=True)
    check = functools.partial(promises.check, with_orbax=False)
    for cut in power.cuts(root, events, seed=0, samples=2, every=17):
        power.hold(nursery.scratch, cut, check)


def test_without_durable_a_power_cut_loses_saves_and_never_gives_other_data(
    nursery: Nursery, tmp_path: Path
) -> None:
    root, events = power.record(nursery, tmp_path, durable=False)
    outcomes = set()

    def check(base: Path, said: Said, _: Then) -> None:
        outcomes.add(what_is_left(base, said))

    for cut in power.cuts(root, events, seed=0, samples=5, every=6):
        power.hold(nursery.scratch, cut, check)
    assert outcomes >= {"data is missing", "nothing"}


def what_is_left(base: Path, said: Said) -> str:
    """What is left of the first checkpoint.

    Raises:
      BrokenPromiseError: It holds anything that was not saved.
    """
    path = workload.run_directory(base) / FIRST
    try:
        if not path.exists():
            fp.finalize(path)
        found = fp.load(path)
    except (fp.NoSessionError, fp.IncompleteCheckpointError):
        return "nothing"
    except fp.CorruptCheckpointError as error:
        is_named = any(name in str(error) for name in ("small", "large", "/part."))
        require(is_named, f"it names no leaf, and no part: {error}")
        return "data is missing"
    held = [name for name in SAVES if name in fp.metadata(path).custom_metadata]
    same(found, merged(held), str(path))
    return "all" if set(held) >= set(said.done) & set(SAVES) else "some saves are gone"


def test_a_broken_promise_is_noticed(nursery: Nursery, tmp_path: Path) -> None:
    """The checks themselves: what is held against durable saves does not hold without."""
    root, events = power.record(nursery, tmp_path, durable=False)
    broken = 0
    for cut in power.cuts(root, events, seed=0, samples=1, every=20):
        try:
            power.hold(nursery.scratch, cut, functools.partial(promises.check, with_orbax=False))
        except (BrokenPromiseError, fp.PartialCheckpointError):
            broken += 1
    assert broken >= 3
