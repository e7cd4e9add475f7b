"""Tries every crash point: the process is killed, or its disk fails, at each change in turn.

    python tests/long_runs sweep --seed 0                     all of them; an hour on two cores
    python tests/long_runs sweep --series killed              some of them
    python tests/long_runs sweep --sample 200                 a sample of all

The last line says how many points were tried, and at how many of them everything held.
"""

from __future__ import annotations

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


def main() -> int:
    """Tries them; prints a line for each that did not hold, and a summary."""
    options = trials.options(__doc__ or "", seed=0, series="", sample=0, directory=None)
    logging.getLogger("flax_partial").setLevel(logging.CRITICAL)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        nursery = Nursery(Path(directory).resolve())
        counts = points.count_changes(nursery)
        names = [options.series] if options.series else list(points.SERIES)
        chosen = points.every(counts, names, options.seed)
        if options.sample:
            chosen = points.sample(counts, options.sample, options.seed)
        checks = ((one.series, functools.partial(points.hold, nursery, one)) for one in chosen)
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
