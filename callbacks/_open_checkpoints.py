"""The checkpoints that callbacks still add to, and the metrics that score them.

A checkpoint goes to the finalizer once it is closed and has its score, or can no longer get one.
One that lacks anything is dropped, or left to the next run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax_partial.callbacks._metrics import StepMetrics

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from flax_partial.callbacks._checkpoint import Checkpoint
    from flax_partial.callbacks._finalizer import Finalizer


class OpenCheckpoints:
    """The checkpoints of a run that the finalizer does not have yet, by step."""

    def __init__(self, finalizer: Finalizer, lock: threading.RLock) -> None:
        """Prepares it; `lock` is the run's, which may hold it when it calls."""
        self._finalizer = finalizer
        self._lock = lock  # guards all below
        self._by_step: dict[int, Checkpoint] = {}
        self._metrics = StepMetrics()

    def __iter__(self) -> Iterator[Checkpoint]:
        with self._lock:
            return iter(tuple(self._by_step.values()))

    def __bool__(self) -> bool:
        return bool(self._by_step)

    def get(self, step: int) -> Checkpoint | None:
        """Returns the checkpoint of a step, if it is open."""
        return self._by_step.get(step)

    def add(self, checkpoint: Checkpoint) -> None:
        """Adds a new one."""
        with self._lock:
            self._by_step[checkpoint.step] = checkpoint

    def take_all(self) -> list[Checkpoint]:
        """Returns all; from now on none is open."""
        with self._lock:
            taken = list(self._by_step.values())
            self._by_step.clear()
        return taken

    @property
    def metric_names(self) -> AbstractSet[str]:
        """Names of all metrics that the trainer has, whatever step they are of."""
        return self._metrics.names

    def look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Looks at the trainer's metrics: what was set since the last look is of this step.

        Args:
          step: The newest finished step.
          metrics: The trainer's.
        """
        with self._lock:
            self._metrics.look(step, metrics)

    def finish_scored(self) -> None:
        """Finalizes the closed checkpoints that have all their scores."""
        with self._lock:
            for checkpoint in self:
                has_scores = checkpoint.monitors <= self._metrics.of(checkpoint.step).keys()
                if checkpoint.is_closed and has_scores:
                    self._finish(checkpoint)

    def finish_closed(self) -> None:
        """Finalizes the closed checkpoints: what has no score by now gets none."""
        with self._lock:
            for checkpoint in self:
                if checkpoint.is_closed:
                    self._finish(checkpoint)

    def settle(self, *, before: int | None = None) -> None:
        """Finalizes the closed checkpoints, of steps before `before`, and drops the open ones."""
        with self._lock:
            for checkpoint in self:
                if before is not None and checkpoint.step >= before:
                    continue
                if checkpoint.is_closed:
                    self._finish(checkpoint)
                else:
                    del self._by_step[checkpoint.step]
                    self._finalizer.drop(checkpoint)

    def _finish(self, checkpoint: Checkpoint) -> None:
        # It is there no more if another run of this process has begun meanwhile.
        if self._by_step.pop(checkpoint.step, None) is not None:
            metrics = self._metrics.of(checkpoint.step)
            known = frozenset(self._metrics.names)
            self._finalizer.finalize(checkpoint, metrics, known=known)
