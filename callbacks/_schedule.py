"""When to save, and which checkpoints to keep. Pure rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Schedule:
    """At which steps to save.

    Attributes:
      every_n_epochs: Save at the end of each n-th epoch; None for no epoch.
      every_n_train_steps: Save at each n-th step, too; None for no step.
      train_time_interval: Save when so much time has gone by since the last save, too.
    """

    every_n_epochs: int | None
    every_n_train_steps: int | None
    train_time_interval: timedelta | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ValueError: A period is below 1, an interval not positive, or nothing would ever be
            saved.
          TypeError: The interval is no `timedelta`.
        """
        _check_count("every_n_epochs", self.every_n_epochs)
        _check_count("every_n_train_steps", self.every_n_train_steps)
        _check_interval("train_time_interval", self.train_time_interval)
        periods = (self.every_n_epochs, self.every_n_train_steps, self.train_time_interval)
        if all(period is None for period in periods):
            raise ValueError(
                "every_n_epochs, every_n_train_steps and train_time_interval are all None: nothing "
                "would be saved. Give one of them."
            )

    def is_step_due(self, step: int) -> bool:
        """Whether to save after `step` optimizer steps, whatever the epoch."""
        return self.every_n_train_steps is not None and step % self.every_n_train_steps == 0

    def is_epoch_due(self, epoch: int) -> bool:
        """Whether to save at the end of an epoch, the first being 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a directory to keep.

    Attributes:
      keep_last: Keep this many of the newest; None: see `save_top_k`.
      monitor: Name of the metric that scores a checkpoint.
      mode: Whether the best score is the smallest ("min") or the largest ("max").
      save_top_k: Keep this many of the best; None: see `keep_last`.
      keep_every_n_steps: Keep the first checkpoint at or after each n-th step, too.
      keep_time_interval: Keep the oldest checkpoint too, and after it always the first that is
        finalized so much later than the one kept before.

    What any of these keeps is kept. Without any, everything is; with any, the newest always.
    """

    keep_last: int | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    save_top_k: int | None = None
    keep_every_n_steps: int | None = None
    keep_time_interval: timedelta | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ValueError: A count is below 1, an interval not positive, `mode` is unknown, or there is
            no metric to rank by.
          TypeError: An interval is no `timedelta`.
        """
        _check_count("keep_every_n_steps", self.keep_every_n_steps)
        _check_interval("keep_time_interval", self.keep_time_interval)
        _check_count("keep_last", self.keep_last)
        _check_count("save_top_k", self.save_top_k)
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'min' or 'max'.")
        if self.save_top_k is not None and self.monitor is None:
            raise ValueError(
                f"save_top_k={self.save_top_k} needs a score to rank by. Pass monitor=, the name "
                "of one of the trainer's callback_metrics."
            )

    @property
    def removes(self) -> bool:
        """Whether any checkpoint is ever removed."""
        kept = (self.keep_last, self.save_top_k, self.keep_every_n_steps, self.keep_time_interval)
        return any(rule is not None for rule in kept)

    @property
    def looks_inside(self) -> bool:
        """Whether it takes more than the steps to tell what is removed."""
        return self.save_top_k is not None or self.keep_time_interval is not None

    def ranked(self, steps: Iterable[int], scores: Mapping[int, float]) -> list[int]:
        """Steps from best to worst, equals newest first; those without a score come last."""
        sign = 1 if self.mode == "min" else -1

        def rank(step: int) -> tuple[bool, float, int]:
            return (step not in scores, sign * scores.get(step, 0.0), -step)

        return sorted(steps, key=rank)

    def expired(
        self,
        steps: Iterable[int],
        scores: Mapping[int, float] | None = None,
        times: Mapping[int, float] | None = None,
    ) -> list[int]:
        """Steps to remove, oldest first; never the newest.

        Args:
          steps: All finalized steps of the directory.
          scores: Step to score; those without one rank last.
          times: Step to when it was finalized, in seconds; those without are not kept by time.
        """
        ordered = sorted(steps)
        if not self.removes:
            return []
        kept = set(ordered[-(self.keep_last or 1) :])
        kept |= set(self.ranked(ordered, scores or {})[: self.save_top_k or 0])
        kept |= self._kept_by_steps(ordered)
        kept |= self._kept_by_time(ordered, times or {})
        return [step for step in ordered if step not in kept]

    def _kept_by_steps(self, ordered: Iterable[int]) -> set[int]:
        """Whether a step is kept depends on no later one: what is kept once is kept for good."""
        if self.keep_every_n_steps is None:
            return set()
        first: dict[int, int] = {}
        for step in ordered:
            first.setdefault(step // self.keep_every_n_steps, step)
        return {step for period, step in first.items() if period > 0}

    def _kept_by_time(self, ordered: Iterable[int], times: Mapping[int, float]) -> set[int]:
        if self.keep_time_interval is None:
            return set()
        kept: set[int] = set()
        due = -math.inf
        for step in ordered:
            if step in times and times[step] >= due:
                kept.add(step)
                due = times[step] + self.keep_time_interval.total_seconds()
        return kept


def _check_count(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1, or None.")


def _check_interval(name: str, value: timedelta | None) -> None:
    if value is None:
        return
    if not isinstance(value, timedelta):
        raise TypeError(f"{name} is {value!r}; it must be a datetime.timedelta, or None.")
    if value <= timedelta(0):
        raise ValueError(f"{name} is {value}; it must be longer than nothing, or None.")
