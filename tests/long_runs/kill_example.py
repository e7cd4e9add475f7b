"""Kills the main example at random moments and runs it again: it loses nothing, and ends the same.

    python tests/long_runs kill_example --kills 200 --seed 0        half an hour on two cores

In half of the runs a directory sees kill after kill until the job has come to its end; in the other
half each kill has a directory of its own. After each kill the directory is looked at from outside:
the newest checkpoint whose every leaf is there, finalized or not, is the one that the next start
has to go on from. The last start has to end well, with the bits of a run that nothing stopped.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from example_process import SMALL, Ended, Example, assert_same_bits, digests, leaves_of
from trials import say

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERY_STEP = (*SMALL, "--steps-per-epoch", 6, "--checkpoint-every", 1)
_START = re.compile(r"^(?:Resumed at step (\d+)|No checkpoint in)", re.MULTILINE)


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
      lines: How many lines it must have printed since it told where it begins; None for no matter.
      delay_secs: How long after that, or after its start.
    """

    lines: int | None
    delay_secs: float

    @classmethod
    def drawn(cls, draw: random.Random) -> Moment:
        """Draws one: while it starts, recovers and compiles, or while it trains and saves."""
        if draw.random() < 0.2:
            return cls(None, draw.uniform(0, 5))
        return cls(draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 10, 12)), draw.uniform(0, 0.15))

    def has_come(self, lines: list[str]) -> bool:
        """Whether enough has been printed."""
        begins = [at for at, line in enumerate(lines) if _START.match(line)]
        return self.lines is None or bool(begins and len(lines) - begins[0] > self.lines)


def run(example: Example, directory: Path, moment: Moment | None = None) -> Ended:
    """Runs the example to its end, or to the moment at which it is killed."""
    if moment is None:
        return example.run("--directory", directory)
    return example.run(
        "--directory", directory, until=moment.has_come, delay_secs=moment.delay_secs
    )


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing stopped; every other run has to end like it.

    Attributes:
      digests: Fingerprints of what was trained, as it prints them.
      steps: The checkpoints it keeps.
      names: Names of the leaves of each.
      leaves: Those of the newest checkpoint.
    """

    digests: list[str]
    steps: list[int]
    names: frozenset[str]
    leaves: dict[str, Any]

    @classmethod
    def of(cls, example: Example, directory: Path) -> Unbroken:
        """Runs it."""
        output, newest = example.complete("--directory", directory), fp.latest(directory)
        assert newest is not None
        names = frozenset(fp.metadata(newest).leaves)
        return cls(digests(output), fp.steps(directory), names, leaves_of(newest))


def newest_complete(directory: Path, names: frozenset[str]) -> int:
    """The last step of which everything is there, finalized or not; 0 if there is none.

    It is told by its leaves alone, not by what the callback reports.
    """
    steps = fp.steps(directory)
    for session in directory.glob("*.partial_save"):
        if frozenset(fp.status(session).leaves) >= names:
            steps.append(int(session.name.removesuffix(".partial_save")))
    return max(steps, default=0)


class Trials:
    """Many kills, each followed by what comes of it."""

    def __init__(self, example: Example, unbroken: Unbroken, scratch: Path, seed: int) -> None:
        self._example = example
        self._unbroken = unbroken
        self._scratch = scratch
        self._draw = random.Random(seed)  # noqa: S311 - of moments, not of secrets
        self.kills = self.ends = 0

    def run(self, kills: int) -> Iterator[str]:
        """Kills so often; yields a line for each start.

        Raises:
          AssertionError: Something was lost, or needs a hand; the directory is left as it was.
        """
        while self.kills < kills:
            directory = Path(tempfile.mkdtemp(dir=self._scratch)) / "run"
            is_fresh = self._draw.random() < 0.5
            try:
                yield from self._to_the_end(directory, 1 if is_fresh else kills)
            except AssertionError as error:
                error.add_note(f"after {self.kills} kills, in {directory}")
                raise
            shutil.rmtree(directory.parent)

    def _to_the_end(self, directory: Path, most: int) -> Iterator[str]:
        """Kills until it has come to its end, but not more than `most` times."""
        here = known = 0
        while True:
            moment = Moment.drawn(self._draw) if here < most else None
            ended = run(self._example, directory, moment)
            start = _START.search(ended.output)
            at = int(start[1] or 0) if start else None
            assert at in {None, known}, f"it went on from {at}, not {known}: {ended}"
            if ended.status != -9 or moment is None:
                break
            here, self.kills = here + 1, self.kills + 1
            known = newest_complete(directory, self._unbroken.names)
            yield f"kill {self.kills}: {moment}; {at} -> {known}"
        self._check_end(directory, ended)
        self.ends += 1
        yield f"ended well after {here} kills"

    def _check_end(self, directory: Path, ended: Ended) -> None:
        unbroken = self._unbroken
        assert (ended.status, ended.errors) == (0, ""), f"it failed: {ended}"
        assert digests(ended.output) == unbroken.digests, f"other bits: {ended}"
        # Killed once its last checkpoint was finalized, it may not have removed the oldest, which a
        # run that has nothing left to train leaves alone.
        steps, end = fp.steps(directory), unbroken.steps[-1]
        more = steps[:1] if f"Resumed at step {end}." in ended.output else []
        assert steps in (unbroken.steps, [*more, *unbroken.steps]), f"other steps: {steps}"
        assert_same_bits(leaves_of(directory / str(unbroken.steps[-1])), unbroken.leaves)
        names = {path.name for path in directory.iterdir()} - {"run.json", "timeline"}
        assert names == set(map(str, steps)), f"it left {sorted(names)}"


def main() -> int:
    """Kills; prints a line for each start, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="kill_example."))
    begun = time.monotonic()
    example = Example("pipeline_lm.py", scratch / "compiled", *EVERY_STEP)
    trials = Trials(example, Unbroken.of(example, scratch / "unbroken"), scratch, options.seed)
    outcome = "none of them lost anything"
    try:
        for line in trials.run(options.kills):
            say(line)
    except AssertionError as error:
        outcome = f"BROKEN {error}, {' '.join(getattr(error, '__notes__', ()))}"
    else:
        shutil.rmtree(scratch)
    say(
        f"seed {options.seed}: {trials.kills} kills, {trials.ends} runs came to the same end, "
        f"{time.monotonic() - begun:.0f} s; {outcome}"
    )
    return 1 if outcome.startswith("BROKEN") else 0


if __name__ == "__main__":
    sys.exit(main())
