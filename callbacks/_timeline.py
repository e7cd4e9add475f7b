"""Records the timeline of a run while it trains, at next to no cost for training.

Events are kept in memory, and written by the threads that save and finalize: at most every fifth of
a second, and when a checkpoint has ended; into an object store only then. A process that is killed
loses what is not written yet. A timeline that cannot be written is logged once; it never fails a
training run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax

import flax_partial as fp
from flax_partial.callbacks import _rows
from flax_partial.runs import timeline, timeline_logs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flax_partial.runs.directory import AnyPath

logger = logging.getLogger(__name__)

_MOST_STEPS = 1000  # since the last write: a run that never saves must not fill the memory
_BRIEF_SECS = 1e-4  # what blocks training for less is added up, not listed
_FLUSH_SECS = 0.2

_Span = tuple[str, float, float]


class Recorder:
    """Records what one process does in a run's directory; from any thread."""

    def __init__(self, directory: AnyPath) -> None:
        self._directory = directory
        self._log = timeline_logs.log_of(directory)
        self._lock = threading.Lock()  # guards the events below, for an instant at a time
        self._file_lock = threading.Lock()  # one thread at a time appends to the log
        self._has_failed = False
        self._flushed = 0.0
        self._step_began: float | None = None
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=_MOST_STEPS)
        self._spans: dict[int | None, list[_Span]] = {}
        self._brief_secs: dict[int | None, float] = {}
        self._lines: list[str] = []

    def begin(self, run: str) -> None:
        """Begins another run, with what led up to it."""
        if self._steps or self._lines:
            self.flush()
        with self._file_lock:
            self._log.begin(run)

    def step_began(self) -> None:
        """Records that a training step begins."""
        if self._step_began is None:
            self._step_began = time.time()

    def step_ended(self, number: int) -> None:
        """Records that it ends; where several callbacks do so, the last one counts."""
        now = time.time()
        with self._lock:
            began, self._step_began = self._step_began, None
            if self._steps and self._steps[-1][0] == number:
                began = self._steps.pop()[1]
            if began is not None:
                self._steps.append((number, began, now))

    def blocked(self, step: int | None, secs: float, hook: str) -> None:
        """Records that training was blocked until now, for the checkpoint of a step."""
        now = time.time()
        with self._lock:
            if secs < _BRIEF_SECS:
                self._brief_secs[step] = self._brief_secs.get(step, 0.0) + secs
            else:
                self._spans.setdefault(step, []).append((hook, now - secs, now))

    def saved(self, step: int, group: str, where: str, report: fp.SaveReport) -> None:
        """Records a group that is committed."""
        save = timeline.Save(step, group, where, report.bytes, report.times)
        with self._lock:
            self._lines.append(timeline.encode_save(save))
        if self._log.takes_often and time.monotonic() - self._flushed > _FLUSH_SECS:
            self.flush()

    def ended(self, step: int, outcome: str, *, began_at: float, ended_at: float) -> None:
        """Records that a checkpoint was finalized or given up, and writes all there is."""
        span = {"began_at": began_at, "ended_at": ended_at}
        with self._lock:
            self._lines.append(timeline.encode("end", step=step, outcome=outcome, **span))
        self.flush()

    def flush(self) -> None:
        """Writes what was recorded."""
        with self._file_lock:
            self._flushed = time.monotonic()
            lines = self._take()
            if not lines:
                return
            try:
                self._log.append(lines)
            except OSError as error:
                if not self._has_failed:
                    logger.warning("The timeline of %s has gaps: %s", self._directory, error)
                self._has_failed = True

    def _take(self) -> list[str]:
        with self._lock:
            lines, self._lines = self._lines, []
            steps, self._steps = self._steps, deque(maxlen=_MOST_STEPS)
            spans, self._spans = self._spans, {}
            brief_secs, self._brief_secs = self._brief_secs, {}
        if steps:
            lines.append(timeline.encode("steps", steps=list(steps)))
        for step in {**spans, **brief_secs}:
            held = {"spans": spans.get(step, []), "brief_secs": brief_secs.get(step, 0.0)}
            lines.append(timeline.encode("held", step=step, **held))
        return lines


def devices_of(leaves: Iterable[tuple[Any, Any]]) -> str:
    """Returns on which devices some leaves are: "cpu:0", "gpu:4-7"; "" if in the host's memory."""
    is_part = fp.Slice | _rows.Row
    values = (leaf.value if isinstance(leaf, is_part) else leaf for _, leaf in leaves)
    shardings = dict.fromkeys(one.sharding for one in values if isinstance(one, jax.Array))
    return ",".join(dict.fromkeys(_devices(sharding) for sharding in shardings))


@lru_cache(maxsize=1024)
def _devices(sharding: jax.sharding.Sharding) -> str:
    devices: list[Any] = sorted(sharding.device_set, key=_number)
    first, last = map(_number, (devices[0], devices[-1]))
    return f"{devices[0].platform}:{first}" + (f"-{last}" if last != first else "")


def _number(device: Any) -> int:
    return int(device.id)
