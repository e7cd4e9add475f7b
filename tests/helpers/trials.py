"""What the long scripts share: many trials, each of a seed of its own, and a line that sums up."""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Tally = collections.Counter[str]
# From a seed: what was tried, its kind first, and what did not hold.
Trial = Callable[[int], tuple[str, list[str]]]


def say(text: str) -> None:
    """Writes a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def options(document: str, **defaults: Any) -> argparse.Namespace:
    """Returns the options of the command line, of the types of the defaults.

    Args:
      document: The script's docstring.
      **defaults: Name of an option to its value where it is not given; None for a directory.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    for name, default in defaults.items():
        kind = Path if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def hold_all(checks: Iterable[tuple[str, Callable[[], object]]]) -> tuple[Tally, Tally]:
    """Runs checks of some kinds; reports which fail, and how many of each passed."""
    tried: Tally = collections.Counter()
    held: Tally = collections.Counter()
    for kind, check in checks:
        tried[kind] += 1
        try:
            check()
        except Exception as error:  # noqa: BLE001 - whatever it is, it did not hold
            notes = " ".join(getattr(error, "__notes__", ()))
            say(f"BROKEN {notes}: {type(error).__name__}: {error}")
        else:
            held[kind] += 1
    return tried, held


def run(document: str, start: Callable[[Path], Trial], *, trials: int) -> int:
    """Runs as many trials as the options say; returns the exit status.

    Args:
      document: The script's docstring.
      start: Makes the trial, given an empty directory.
      trials: How many to run by default.
    """
    chosen = options(document, trials=trials, seed=0, directory=None)
    tally: Tally = collections.Counter()
    held, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        trial = start(Path(directory))
        for seed in range(chosen.seed, chosen.seed + chosen.trials):
            what, faults = trial(seed)
            tally[what.split()[0]] += 1
            held += not faults
            if faults:
                say(f"seed {seed}: {what}: {'; '.join(faults)[:1000]}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(tally.items()))
    secs = time.monotonic() - begun
    say(f"{chosen.trials} tried ({kinds}), {held} held; seed {chosen.seed}, {secs:.0f} s")
    return int(held != chosen.trials)
