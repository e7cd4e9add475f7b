"""Tries every crash point: the process is killed, or its disk fails, at each change in turn.

    python tests/long_runs sweep --seed 0                     all of them; an hour on two cores
    python tests/long_runs sweep --series killed              some of them
    python tests/long_runs sweep --sample 200                 a sample of all
    python tests/long_runs sweep --locks files                sessions kept by control files

With control files only finalize follows: once there is a verdict, saves and abort are refused.

The last line says how many points were tried, and at how many of them everything held.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import points
import trials
from nursery import Nursery
from points import Point
from promises import Then

import flax_partial as fp
from flax_partial.storage import locks


def _hold_unlocked(nursery: Nursery, point: Point) -> None:
    """Tries one; an abort that is killed may have dropped the session, and left its directory."""
    try:
        points.hold(nursery, dataclasses.replace(point, then=Then.FINALIZE))
    except fp.NoSessionError as error:
        if not any("(abort, after" in note for note in error.__notes__):
            raise


def main() -> int:
    """Tries them; prints a line for each that did not hold, and a summary."""
    options = trials.options(
        __doc__ or "", seed=0, series="", sample=0, directory=None, locks="auto"
    )
    os.environ[locks.VARIABLE] = options.locks
    logging.getLogger("flax_partial").setLevel(logging.CRITICAL)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        nursery = Nursery(Path(directory).resolve())
        counts = points.count_changes(nursery)
        names = [options.series] if options.series else list(points.SERIES)
        chosen = points.every(counts, names, options.seed)
        if options.sample:
            chosen = points.sample(counts, options.sample, options.seed)
        hold = _hold_unlocked if options.locks == "files" else points.hold
        checks = ((one.series, functools.partial(hold, nursery, one)) for one in chosen)
        tried, held = trials.hold_all(checks)
        nursery.close()
    for name, number in tried.items():
        trials.say(f"{name:24} {number:5} points tried, {held[name]:5} held")
    trials.say(
        f"seed {options.seed}, {counts[0]} changes, {counts[1]} of them writes: {tried.total()} "
        f"points tried, {held.total()} held, {time.monotonic() - begun:.0f} s"
    )
    return int(held != tried)


if __name__ == "__main__":
    sys.exit(main())
