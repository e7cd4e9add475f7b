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
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).parents[2] / "examples" / "pipeline_lm.py"
OPTIONS = ("--layers", "4", "--width", "32", "--steps-per-epoch", "6", "--epochs", "2")
EVERY_STEP = (*OPTIONS, "--checkpoint-every", "1")
_MOST_SECS = 200.0
_START = re.compile(r"^(?:Resumed at step (\d+)|No checkpoint in)", re.MULTILINE)
_DIGEST = re.compile(r"^(?:parameters|optimizer state): +([0-9a-f]{16})$", re.MULTILINE)


class BrokenRunError(AssertionError):
    """A run that was started again did not do as it should."""


@dataclass(frozen=True)
class Ended:
    """One start of the example, and what became of it.

    Attributes:
      status: Its exit status; -9 where it was killed.
      output: What it said.
      errors: What it said on standard error.
    """

    status: int
    output: str
    errors: str

    @property
    def resumed_at(self) -> int | None:
        """The step it went on from; 0 for the beginning, None if it never came to say so."""
        found = _START.search(self.output)
        return int(found[1] or 0) if found else None


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
      lines: How many lines it must have said since it told where it begins; None for no matter.
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


class Example:
    """Starts the example in processes of its own, which share what they compile."""

    def __init__(self, cache: Path) -> None:
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def run(self, directory: Path, moment: Moment | None = None) -> Ended:
        """Runs it to its end, or to the moment at which it is killed."""
        with subprocess.Popen(
            [sys.executable, EXAMPLE, "--directory", directory, *EVERY_STEP],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            reader = _Reader(process)
            if moment is not None:
                reader.wait_for(moment.lines)
                time.sleep(moment.delay_secs)
                process.kill()
            status = process.wait(_MOST_SECS)
            return Ended(status, *reader.all())


class _Reader:
    """Hears a process, line by line, while somebody waits for what it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._output: list[str] = []
        self._errors: list[str] = []
        self._said = threading.Condition()
        self._is_over = False
        self._threads = [threading.Thread(target=self._hear), threading.Thread(target=self._moan)]
        for thread in self._threads:
            thread.start()

    def _hear(self) -> None:
        for line in self._process.stdout or ():
            with self._said:
                self._output.append(line)
                self._said.notify()
        with self._said:
            self._is_over = True
            self._said.notify()

    def _moan(self) -> None:
        self._errors.extend(self._process.stderr or ())

    def wait_for(self, lines: int | None) -> None:
        if lines is None:
            return
        with self._said:
            self._said.wait_for(lambda: self._is_over or self._since_start() > lines, _MOST_SECS)

    def _since_start(self) -> int:
        begins = [at for at, line in enumerate(self._output) if _START.match(line)]
        return len(self._output) - begins[0] if begins else 0

    def all(self) -> tuple[str, str]:
        for thread in self._threads:
            thread.join()
        return "".join(self._output), "".join(self._errors)


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing stopped, which all others have to end like.

    Attributes:
      digests: Fingerprints of what was trained, as it says them.
      steps: The checkpoints it keeps.
      leaves: Names of the leaves of each.
      bits: Leaf of the newest checkpoint to its bytes.
    """

    digests: list[str]
    steps: list[int]
    leaves: frozenset[str]
    bits: dict[str, bytes]

    @classmethod
    def of(cls, example: Example, directory: Path) -> Unbroken:
        """Runs it."""
        ended = example.run(directory)
        _require((ended.status, ended.errors) == (0, ""), f"it fails by itself: {ended}")
        newest = _newest(directory)
        leaves = frozenset(fp.metadata(newest).leaves)
        return cls(_DIGEST.findall(ended.output), fp.steps(directory), leaves, bits_of(newest))


def bits_of(path: Path) -> dict[str, bytes]:
    """The bytes of every leaf of a checkpoint, by the names of its keys."""
    flat, _ = jax.tree_util.tree_flatten_with_path(fp.load(path))
    return {jax.tree_util.keystr(key): _bytes(leaf) for key, leaf in flat}


def _bytes(leaf: Any) -> bytes:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def _newest(directory: Path) -> Path:
    newest = fp.latest(directory)
    _require(newest is not None, f"{directory} holds no checkpoint")
    assert newest is not None
    return newest


def newest_complete(directory: Path, leaves: frozenset[str]) -> int:
    """The last step of which everything is there, finalized or not; 0 if there is none.

    It is told by its leaves alone, not by what the callback says of it.
    """
    steps = fp.steps(directory)
    for session in directory.glob("*.partial_save"):
        if frozenset(fp.status(session).leaves) >= leaves:
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
          BrokenRunError: Something was lost, or needs a hand; the directory is left as it was.
        """
        while self.kills < kills:
            directory = Path(tempfile.mkdtemp(dir=self._scratch)) / "run"
            is_fresh = self._draw.random() < 0.5
            try:
                yield from self._to_the_end(directory, 1 if is_fresh else kills)
            except BrokenRunError as error:
                error.add_note(f"after {self.kills} kills, in {directory}")
                raise
            shutil.rmtree(directory.parent)

    def _to_the_end(self, directory: Path, most: int) -> Iterator[str]:
        """Kills until it has come to its end, but not more than `most` times."""
        here = known = 0
        while True:
            moment = Moment.drawn(self._draw) if here < most else None
            ended = self._example.run(directory, moment)
            at = ended.resumed_at
            _require(at in {None, known}, f"it went on from {at}, not {known}: {ended}")
            if ended.status != -9:
                break
            here, self.kills = here + 1, self.kills + 1
            known = newest_complete(directory, self._unbroken.leaves)
            yield f"kill {self.kills}: {moment}; {at} -> {known}"
        self._check_end(directory, ended)
        self.ends += 1
        yield f"ended well after {here} kills"

    def _check_end(self, directory: Path, ended: Ended) -> None:
        unbroken = self._unbroken
        _require((ended.status, ended.errors) == (0, ""), f"it failed: {ended}")
        _require(_DIGEST.findall(ended.output) == unbroken.digests, f"other bits: {ended}")
        _require(fp.steps(directory) == unbroken.steps, f"other steps: {fp.steps(directory)}")
        _require(bits_of(_newest(directory)) == unbroken.bits, "other bits in the checkpoint")
        names = {path.name for path in directory.iterdir()} - {"run.json", "timeline"}
        _require(names == set(map(str, unbroken.steps)), f"it left {sorted(names)}")


def _require(holds: object, what: str) -> None:
    if not holds:
        raise BrokenRunError(what)


def main() -> int:
    """Kills; prints a line for each start, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="kill_example."))
    begun = time.monotonic()
    example = Example(scratch / "compiled")
    trials = Trials(example, Unbroken.of(example, scratch / "unbroken"), scratch, options.seed)
    outcome = "none of them lost anything"
    try:
        for line in trials.run(options.kills):
            _say(line)
    except BrokenRunError as error:
        outcome = f"BROKEN {error}, {' '.join(getattr(error, '__notes__', ()))}"
    else:
        shutil.rmtree(scratch)
    _say(
        f"seed {options.seed}: {trials.kills} kills, {trials.ends} runs came to the same end, "
        f"{time.monotonic() - begun:.0f} s; {outcome}"
    )
    return 1 if outcome.startswith("BROKEN") else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
