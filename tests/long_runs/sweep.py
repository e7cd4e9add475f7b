"""Tries every crash point: the process is killed, or its disk fails, at each change in turn.

    python tests/long_runs sweep --seed 0                     all of them; an hour on two cores
    python tests/long_runs sweep --series killed              some of them
    python tests/long_runs sweep --sample 200                 a sample of all

The last line says how many points were tried, and at how many of them everything held.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import points
from fileops import build
from nursery import Nursery
from points import SERIES


def main() -> int:
    """Tries them; prints a line for each that did not hold, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of what follows")
    parser.add_argument("--series", action="append", choices=SERIES, help="only these")
    parser.add_argument("--sample", type=int, help="draw so many points of all series")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to work on")
    options = parser.parse_args()
    logging.getLogger("flax_partial").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        return _sweep(Path(directory).resolve(), options)


def _sweep(directory: Path, options: argparse.Namespace) -> int:
    nursery = Nursery(build(directory))
    counts = points.count_changes(nursery, directory)
    if options.sample:
        chosen = points.sample(counts, options.sample, options.seed)
    else:
        chosen = points.every(counts, options.series or list(SERIES), options.seed)
    tried: collections.Counter[str] = collections.Counter()
    held: collections.Counter[str] = collections.Counter()
    begun = time.monotonic()
    for point in chosen:
        tried[point.series] += 1
        try:
            points.hold(nursery, directory, point)
        except Exception as error:  # noqa: BLE001 - whatever it is, the point did not hold
            notes = " ".join(getattr(error, "__notes__", ()))
            _say(f"BROKEN {notes}: {type(error).__name__}: {error}")
        else:
            held[point.series] += 1
    nursery.close()
    for name, number in tried.items():
        _say(f"{name:24} {number:5} points tried, {held[name]:5} held")
    _say(
        f"seed {options.seed}, {counts[0]} changes, {counts[1]} of them writes: {tried.total()} "
        f"points tried, {held.total()} held, {time.monotonic() - begun:.0f} s"
    )
    return 0 if held == tried else 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
