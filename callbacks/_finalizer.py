"""Finalizes checkpoints in the background, and removes those that are no longer kept.

One worker waits for the saves in flight of one checkpoint after another, and finalizes. Another one
removes checkpoints: the next checkpoint does not wait for that.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax

import flax_partial as fp
from flax_partial.callbacks import _directory, progress
from flax_partial.callbacks._background import Worker
from flax_partial.callbacks._metrics import finite_numbers, lacking, log
from flax_partial.runs import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet
    from concurrent.futures import Future
    from pathlib import Path

    from flax_partial.callbacks._checkpoint import Checkpoint
    from flax_partial.callbacks._reports import BlockedTime, CheckpointReport
    from flax_partial.callbacks._schedule import Retention
    from flax_partial.callbacks._tiers import Tiers
    from flax_partial.callbacks._timeline import Recorder


class Finalizer:
    """Finalizes or drops the checkpoints of a directory that no callback adds to any more."""

    def __init__(
        self,
        directory: Path,
        recorder: Recorder,
        timeout_secs: float,
        tiers: Tiers | None = None,
    ) -> None:
        self._directory = directory
        self._tiers = tiers
        self._recorder = recorder
        self._timeout_secs = timeout_secs
        self._worker = Worker("flax_partial_finalize")
        self._remover = Worker("flax_partial_remove")
        self._bar = progress.Bar("Writing checkpoints")
        self._lock = threading.Lock()  # guards all below, for an instant at a time
        self._jobs: list[tuple[Checkpoint, Future[None]]] = []
        self._finalized: list[tuple[CheckpointReport, BlockedTime]] = []
        self._reported: Counter[str] = Counter()  # how many of these each reader has read
        self._resumed: int | None = None

    def finalize(
        self, checkpoint: Checkpoint, metrics: Mapping[str, Any], *, known: AbstractSet[str]
    ) -> None:
        """Finalizes a closed checkpoint; an error is reported to its callbacks.

        Args:
          checkpoint: The checkpoint.
          metrics: Those of its step, possibly still being computed.
          known: Names of all metrics that the trainer has.
        """
        self._submit(checkpoint, functools.partial(self._finalize, checkpoint, metrics, known))

    def drop(self, checkpoint: Checkpoint) -> None:
        """Drops a checkpoint whose step never ended."""
        self._submit(checkpoint, functools.partial(self._drop, checkpoint))

    def prune(self, retention: Retention) -> None:
        """Removes the checkpoints that are not to be kept."""
        self._remover.submit(functools.partial(self._prune, retention))

    def sweep(self) -> None:
        """Deletes what is left of checkpoints whose removal was interrupted."""
        self._remover.submit(functools.partial(_directory.sweep, self._directory))

    def resume(self, step: int) -> None:
        """Keeps the checkpoint that training goes on from, until a newer one is finalized."""
        with self._lock:
            self._resumed = step

    def wait(self, unfinished: Iterable[Checkpoint] = (), *, show_progress: bool = False) -> None:
        """Waits until all checkpoints so far are finalized or dropped.

        Args:
          unfinished: Others, whose bytes are counted in the bar, too.
          show_progress: Whether to show one.
        """
        with self._lock:
            jobs = [job for _, job in self._jobs]
        bar = self._bar if show_progress else None
        progress.wait(jobs, bar, lambda: self._written(unfinished))

    @property
    def is_behind(self) -> bool:
        """Whether a checkpoint is still to be finalized or dropped."""
        return bool(self._under_way())

    def finish(self) -> None:
        """Waits for the removals as well, and until no thread is left."""
        self._worker.finish()
        self._remover.finish()

    @property
    def steps_under_way(self) -> list[int]:
        """Steps of the checkpoints that are not finalized or dropped yet."""
        return [checkpoint.step for checkpoint in self._under_way()]

    @property
    def reports(self) -> tuple[CheckpointReport, ...]:
        """What each checkpoint finalized so far holds and cost, in the order of finalizing."""
        with self._lock:
            finalized = tuple(self._finalized)
        return tuple(replace(report, blocked_secs=blocked.secs) for report, blocked in finalized)

    def new_reports(self, reader: str) -> tuple[CheckpointReport, ...]:
        """Returns those that this reader has not been given before; cheap if there are none."""
        with self._lock:
            first, self._reported[reader] = self._reported[reader], len(self._finalized)
            has_news = first < len(self._finalized)
        return self.reports[first:] if has_news else ()

    def _under_way(self) -> list[Checkpoint]:
        with self._lock:
            return [checkpoint for checkpoint, job in self._jobs if not job.done()]

    def _written(self, unfinished: Iterable[Checkpoint]) -> tuple[int, int]:
        amounts = [checkpoint.written() for checkpoint in [*unfinished, *self._under_way()]]
        return sum(done for done, _ in amounts), sum(total for _, total in amounts)

    def _submit(self, checkpoint: Checkpoint, work: functools.partial[None]) -> None:
        job = self._worker.submit(work)
        with self._lock:
            self._jobs = [(one, other) for one, other in self._jobs if not other.done()]
            self._jobs.append((checkpoint, job))

    def _finalize(
        self, checkpoint: Checkpoint, metrics: Mapping[str, Any], known: AbstractSet[str]
    ) -> None:
        members = checkpoint.members.values()
        try:
            report = checkpoint.finalize(finite_numbers(metrics), timeout_secs=self._timeout_secs)
        except Exception as error:  # noqa: BLE001 - the callbacks decide what follows
            own = checkpoint.error  # of a save in this process
            checkpoint.fail(error, members)
            is_late = isinstance(error, fp.IncompleteCheckpointError)
            is_lost = not is_late and (own is not None or jax.process_count() > 1)
            self._give_up(checkpoint, f"a save failed ({own or error})." if is_lost else None)
            return
        with self._lock:
            self._finalized.append((report, checkpoint.blocked))
            self._resumed = None
        self._recorder.ended(
            report.step,
            timeline.FINALIZED,
            began_at=report.finalized_at - report.finalize_secs,
            ended_at=report.finalized_at,
        )
        log(report)
        for member in members:
            for monitor in member.retention.modes.keys() - report.metrics.keys():
                why = lacking(monitor, metrics, known) + member.retention.about_unranked
                member.warn_once(f"{report.path} has no score: {why}")
            if self._tiers is None:
                self.prune(member.retention)
        if self._tiers is not None:
            self._tiers.add(report.step, [member.retention for member in members])

    def _drop(self, checkpoint: Checkpoint) -> None:
        checkpoint.wait()
        self._give_up(checkpoint, "its step never ended.")

    def _give_up(self, checkpoint: Checkpoint, why_dropped: str | None) -> None:
        now = time.time()
        self._recorder.ended(checkpoint.step, timeline.GIVEN_UP, began_at=now, ended_at=now)
        if why_dropped is not None:
            _directory.drop_unless_complete(
                checkpoint.path, checkpoint.step, why_dropped, timeout_secs=self._timeout_secs
            )

    def _prune(self, retention: Retention) -> None:
        protected = () if self._resumed is None else (self._resumed,)
        _directory.prune(self._directory, retention, protected=protected)
