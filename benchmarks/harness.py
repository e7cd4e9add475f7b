"""Runs a scenario's contenders in interleaved rounds, and compares medians with targets."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.memory_use import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Metrics = dict[str, float]
Medium = Literal["disk", "tmpfs"]

_TMPFS = Path("/dev/shm")  # noqa: S108 - the only place that is surely in memory
_TOUCHED_BYTES = 16 << 20
_PREFIX = "flax_partial_bench."


@dataclass(frozen=True)
class Contender:
    """One way of doing a scenario's work.

    Attributes:
      name: What the table calls it.
      run: Does the work once at a new path, which it creates, and returns what it measured by the
        name of the metric, in seconds but for those in `report.UNITS`. Unless it did so itself, the
        harness adds `memory`: by how many bytes the resident memory of the process rose at most.
      check: Raises if what `run` left below the path is not what it should be. Not measured; called
        after the first round.
      max_rounds: Rounds it takes part in at most, for work that takes minutes.
      medium: Where the path lies.
    """

    name: str
    run: Callable[[Path], Metrics]
    check: Callable[[Path], None] | None = None
    max_rounds: int | None = None
    medium: Medium = "disk"


@dataclass(frozen=True)
class Figure:
    """One number to look up: the median of a contender's metric over its rounds."""

    contender: str
    metric: str = "total"


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of two medians, or on one median where there is no denominator.

    Attributes:
      text: The claim, as the table prints it.
      numerator: The median that is divided.
      denominator: The median by which it is divided; without one, by `unit`.
      at_least: The ratio's lower bound, if it has one. A ratio without bounds is only reported.
      at_most: The ratio's upper bound, if it has one.
      unit: Divides a median that stands alone, such as bytes to be reported in GiB.
    """

    text: str
    numerator: Figure
    denominator: Figure | None = None
    at_least: float | None = None
    at_most: float | None = None
    unit: float = 1.0

    @classmethod
    def faster(
        cls, ours: str, *, than: str, metric: str = "total", at_least: float | None = None
    ) -> Target:
        """Ours takes at most one `at_least`-th of the peer's time."""
        text = f"{metric}: {ours} faster than {than}"
        return cls(text, Figure(than, metric), Figure(ours, metric), at_least=at_least)

    @classmethod
    def within(cls, ours: Figure, *, of: Figure, at_most: float | None = None) -> Target:
        """Ours takes at most `at_most` times the peer's time, or its own of another metric."""
        is_own = ours.contender == of.contender
        names = (ours.metric, of.metric) if is_own else (ours.contender, of.contender)
        subject = ours.contender if is_own else ours.metric
        return cls(f"{subject}: {' over '.join(names)}", ours, of, at_most=at_most)

    @classmethod
    def below(cls, figure: Figure, at_most: float, unit_name: str, unit: float = 1.0) -> Target:
        """A median is at most `at_most` units."""
        text = f"{figure.metric}: {figure.contender}, in {unit_name}"
        return cls(text, figure, at_most=at_most, unit=unit)

    @classmethod
    def keeps(cls, metric: str, ours: str, *, of: str, at_least: float | None = None) -> Target:
        """Ours keeps at least this share of the peer's rate."""
        text = f"{metric}: {ours} over {of}"
        return cls(text, Figure(ours, metric), Figure(of, metric), at_least=at_least)

    @classmethod
    def linear(cls, half: Figure, full: Figure) -> Target:
        """Half the work takes half the time, within 20 %."""
        text = f"{full.metric}: {half.contender} over {full.contender}"
        return cls(text, half, full, at_least=0.4, at_most=0.6)


@dataclass(frozen=True)
class Scenario:
    """The work, its contenders, and the targets.

    Attributes:
      name: Stable, one of `__main__.SCENARIOS`.
      work: The work in a sentence.
      contenders: Ours and the peers; the first round runs them in this order.
      targets: What the medians are compared with.
      touched_bytes: Memory and disk that the work needs at most, touched before measuring.
      prepare: Makes what all contenders use in a directory, which stays until the last round.
      shown: The metric that the plot shows.
    """

    name: str
    work: str
    contenders: tuple[Contender, ...]
    targets: tuple[Target, ...]
    touched_bytes: int = 0
    prepare: Callable[[Path], None] | None = None
    shown: str = "total"


@dataclass
class Outcome:
    """What a scenario measured.

    Attributes:
      scenario: The scenario.
      is_small: Whether a fraction of its work was done, for which no target stands.
      rounds: By contender, the metrics of each of its rounds, in order.
      turns: By contender, for how long its last turn took, in seconds.
      left_out: The contenders of turns for which there was no time.
    """

    scenario: Scenario
    is_small: bool
    rounds: dict[str, list[Metrics]] = field(default_factory=dict)
    turns: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def median(self, figure: Figure) -> float | None:
        """Returns the median of a figure, None where it was not measured."""
        values = [
            metrics[figure.metric]
            for metrics in self.rounds.get(figure.contender, ())
            if figure.metric in metrics
        ]
        return statistics.median(values) if values else None

    def ratio(self, target: Target) -> float | None:
        """Returns the ratio that a target bounds, None where it was not measured."""
        above = self.median(target.numerator)
        below = target.unit if target.denominator is None else self.median(target.denominator)
        return None if above is None or not below else above / below

    def is_met(self, target: Target) -> bool | None:
        """Returns whether a target is met; None where it has no bound or was not measured."""
        ratio = self.ratio(target)
        has_bound = target.at_least is not None or target.at_most is not None
        if self.is_small or ratio is None or not has_bound:
            return None
        low = -float("inf") if target.at_least is None else target.at_least
        high = float("inf") if target.at_most is None else target.at_most
        return low <= ratio <= high


def run_scenario(
    build: Callable[..., Scenario],
    *,
    small: bool,
    rounds: int,
    directory: Path,
    say: Callable[[str], None],
    ends_at: float = math.inf,
) -> Outcome:
    """Runs all rounds of a scenario.

    Args:
      build: The scenario module's own.
      small: Whether to do a fraction of the work, to see that everything runs.
      rounds: How many rounds; a contender may limit its own.
      directory: Where on disk the checkpoints are written; emptied of them after each turn.
      say: Called with what runs at present.
      ends_at: When to end, on the monotonic clock: no turn is begun then, or if the one before it
        of the same contender took longer than what is left.

    Returns:
      What was measured.
    """
    with _places(directory) as places:
        if not small:
            _warm_up(build(small=True), places, directory, say)
        scenario = build(small=small)
        used = {contender.medium for contender in scenario.contenders}
        _touch(scenario.touched_bytes, [places[medium] for medium in used & places.keys()])
        outcome = Outcome(scenario, is_small=small)
        with _prepared(scenario, directory, say):
            for number, contender in _turns(scenario, rounds, places):
                begun = time.monotonic()
                if begun + outcome.turns.get(contender.name, 0) > ends_at:
                    outcome.left_out.append(contender.name)
                    continue
                say(f"{scenario.name}, round {number + 1} of {rounds}: {contender.name}")
                metrics = _take_turn(contender, places[contender.medium], check=number == 0)
                outcome.rounds.setdefault(contender.name, []).append(metrics)
                outcome.turns[contender.name] = time.monotonic() - begun
    return outcome


def _warm_up(
    trial: Scenario, places: Mapping[Medium, Path], directory: Path, say: Callable[[str], None]
) -> None:
    """Pays for imports, compilation and thread pools, once for every contender, by small work."""
    with _prepared(trial, directory, say):
        for contender in trial.contenders:
            if contender.medium in places:
                say(f"{trial.name}: warming up {contender.name}")
                _take_turn(contender, places[contender.medium], check=True)


def _turns(
    scenario: Scenario, rounds: int, places: Mapping[Medium, Path]
) -> Iterator[tuple[int, Contender]]:
    """Yields the number of a round and a contender, in an order that is rotated by each round."""
    count = len(scenario.contenders)
    for number in range(rounds):
        for contender in (scenario.contenders[(number + at) % count] for at in range(count)):
            most = rounds if contender.max_rounds is None else contender.max_rounds
            if number < most and contender.medium in places:
                yield number, contender


def _take_turn(contender: Contender, place: Path, *, check: bool) -> Metrics:
    path = place / "checkpoint"
    # What others left to be written is written before the clock starts, not under it.
    os.sync()
    try:
        metrics = measured(lambda: contender.run(path))
        if check and contender.check is not None:
            contender.check(path)
    finally:
        for leftover in place.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return metrics


@contextlib.contextmanager
def _prepared(scenario: Scenario, directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    if scenario.prepare is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as place:
        say(f"{scenario.name}: preparing")
        scenario.prepare(Path(place))
        yield


@contextlib.contextmanager
def _places(directory: Path) -> Iterator[Mapping[Medium, Path]]:
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        parents: dict[Medium, Path] = {"disk": directory, "tmpfs": _TMPFS}
        places: dict[Medium, Path] = {}
        for medium, parent in parents.items():
            if parent.is_dir():
                new = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
                places[medium] = Path(stack.enter_context(new))
        yield places


def _touch(count: int, places: Iterable[Path]) -> None:
    """Touches `count` bytes of the process's memory and of the page cache, in each place."""
    block = os.urandom(_TOUCHED_BYTES)
    blocks = range(count // _TOUCHED_BYTES)
    held = [bytearray(block) for _ in blocks]
    del held
    for place in places:
        path = place / "touched"
        with path.open("wb") as file:
            for _ in blocks:
                file.write(block)
            os.fsync(file.fileno())
        path.unlink()
