"""What the long scripts share: many trials, each of a seed of its own, and a line that sums up."""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    # From a seed: what was tried, its kind first, and what did not hold.
    Trial = Callable[[int], tuple[str, list[str]]]


def say(text: str) -> None:
    """Writes a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(document: str, start: Callable[[Path], Trial], *, trials: int) -> int:
    """Runs as many trials as the command line says; returns the exit status.

    Args:
      document: The script's docstring.
      start: Makes the trial, given an empty directory.
      trials: How many to run by default.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=Path, help="where to work; a temporary one if not given"
    )
    options = parser.parse_args()
    tally: collections.Counter[str] = collections.Counter()
    held, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        trial = start(Path(directory))
        for seed in range(options.seed, options.seed + options.trials):
            what, faults = trial(seed)
            tally[what.split()[0]] += 1
            held += not faults
            if faults:
                say(f"seed {seed}: {what}: {'; '.join(faults)[:1000]}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(tally.items()))
    secs = time.monotonic() - begun
    say(f"{options.trials} tried ({kinds}), {held} held; seed {options.seed}, {secs:.0f} s")
    return int(held != options.trials)
