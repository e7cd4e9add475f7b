"""Policies: which checkpoints of a run to keep. Pure rules, which a user can combine and read.

    PartialCheckpointCallback("runs/lm", keep=[LatestN(3), BestN(2, "val_loss", "min")])

What any policy keeps is kept, and the newest checkpoint always is. A policy of one's own is an
object with a method `keep`; it may call others:

    class BestOfTheNewest:
        def keep(self, saved):
            return BestN(1, "val_loss", "min").keep(saved[-10:])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Mode = Literal["min", "max"]
"""Whether the best score is the smallest or the largest."""


@dataclass(frozen=True)
class SavedStep:
    """A finalized checkpoint, as a policy sees it.

    Attributes:
      step: Its step.
      metrics: The finite metrics of its step.
      ranked_by: Metric to the mode by which the run that saved it ranked its checkpoints.
      finalized_at: When it was finalized, in seconds since the epoch; None if that is not known.
    """

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    ranked_by: Mapping[str, Mode] = field(default_factory=dict)
    finalized_at: float | None = None


class Policy(Protocol):
    """Decides which checkpoints of a run to keep."""

    def keep(self, saved: Sequence[SavedStep]) -> Collection[int]:
        """Returns the steps to keep.

        Args:
          saved: All finalized checkpoints of the run, by step, the oldest first.
        """


@dataclass(frozen=True)
class LatestN:
    """Keeps the newest checkpoints.

    Attributes:
      count: How many.
    """

    count: int
    looks_inside: ClassVar = False  # its steps are all it takes to know what is kept

    def __post_init__(self) -> None:
        """Raises ValueError if the count is below 1."""
        check_count("LatestN.count", self.count)

    def keep(self, saved: Sequence[SavedStep]) -> set[int]:
        """Returns the steps to keep."""
        return {one.step for one in saved[-self.count :]}


@dataclass(frozen=True)
class BestN:
    """Keeps the best checkpoints by a metric, of equals the newest, and some that cannot be ranked.

    A checkpoint is not ranked if its step lacked the metric (or it was no finite number), or if the
    run that saved it ranked by the other mode. It may be the best of all: so the newest of these
    are kept, too, up to a number that keeps them from filling the disk.

    Attributes:
      count: How many.
      monitor: The metric.
      mode: Whether the best is the smallest or the largest.
      max_unranked: How many of those that are not ranked are kept at most.
    """

    count: int
    monitor: str
    mode: Mode
    max_unranked: int = 5

    def __post_init__(self) -> None:
        """Raises ValueError for a count that is too small, or an unknown mode."""
        check_count("BestN.count", self.count)
        if self.max_unranked < 0:
            raise ValueError(f"BestN.max_unranked is {self.max_unranked}; it must be at least 0.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"BestN.mode is {self.mode!r}; it must be 'min' or 'max'.")

    def keep(self, saved: Sequence[SavedStep]) -> set[int]:
        """Returns the steps to keep."""
        scores = {one.step: one.metrics[self.monitor] for one in saved if self._ranks(one)}
        unranked = self.unranked(saved)
        kept = unranked[len(unranked) - min(self.max_unranked, len(unranked)) :]
        return {*ranked(scores, self.mode)[: self.count], *kept}

    def unranked(self, saved: Sequence[SavedStep]) -> list[int]:
        """Returns the steps whose score is not known, in their order."""
        return [one.step for one in saved if not self._ranks(one)]

    def _ranks(self, one: SavedStep) -> bool:
        is_alike = one.ranked_by.get(self.monitor, self.mode) == self.mode
        return is_alike and math.isfinite(one.metrics.get(self.monitor, math.nan))


@dataclass(frozen=True)
class EveryNSteps:
    """Keeps the first checkpoint at or after each n-th step, and step 0.

    Whether one is kept depends on no later one: what is kept once is kept for good.

    Attributes:
      steps: The period.
    """

    steps: int
    looks_inside: ClassVar = False

    def __post_init__(self) -> None:
        """Raises ValueError if the period is below 1."""
        check_count("EveryNSteps.steps", self.steps)

    def keep(self, saved: Sequence[SavedStep]) -> set[int]:
        """Returns the steps to keep."""
        first: dict[int, int] = {}
        for one in saved:
            first.setdefault(one.step // self.steps, one.step)
        return {step for period, step in first.items() if period > 0 or step == 0}


@dataclass(frozen=True)
class EveryInterval:
    """Keeps the oldest checkpoint, and after it always the first that is finalized so much later.

    Attributes:
      interval: How much.
    """

    interval: timedelta

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError if it is no `timedelta`, or not longer than nothing."""
        check_interval("EveryInterval.interval", self.interval)

    def keep(self, saved: Sequence[SavedStep]) -> set[int]:
        """Returns the steps to keep."""
        kept: set[int] = set()
        due = -math.inf
        for one in saved:
            if one.finalized_at is not None and one.finalized_at >= due:
                kept.add(one.step)
                due = one.finalized_at + self.interval.total_seconds()
        return kept


def ranked(scores: Mapping[int, float], mode: Mode) -> list[int]:
    """Returns steps from best to worst by their scores, of equals the newest first."""
    sign = 1 if mode == "min" else -1
    return sorted(scores, key=lambda step: (sign * scores[step], -step))


def check_count(name: str, value: int | None) -> None:
    """Raises TypeError if a count is no whole number, and ValueError if it is below 1."""
    if value is None:
        return
    if not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be a whole number, or None.")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1, or None.")


def check_interval(name: str, value: timedelta | None) -> None:
    """Raises TypeError if it is no `timedelta`, and ValueError if it is not positive."""
    if value is None:
        return
    if not isinstance(value, timedelta):
        raise TypeError(f"{name} is {value!r}; it must be a datetime.timedelta, or None.")
    if value <= timedelta(0):
        raise ValueError(f"{name} is {value}; it must be positive, or None.")
