"""Finalizes checkpoints in the background, once all callbacks that save into them are done.

A checkpoint is *open* while callbacks may add to it, and *closed* once the last of them is done.
Then, or at the end of its epoch, it becomes the worker's: one thread, which waits for the saves in
flight, and finalizes. Another one removes the checkpoints that are no longer to be kept: the next
checkpoint does not wait for that. One that lacks anything is never finalized.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

import flax_partial as fp
from flax_partial.callbacks import _directory, progress
from flax_partial.callbacks._background import Worker
from flax_partial.callbacks._checkpoint import Participant, PendingCheckpoint
from flax_partial.callbacks._metrics import check_score, finite_numbers, log
from flax_partial.callbacks._preemption import Preemption
from flax_partial.callbacks._reports import CheckpointReport, HeldTime
from flax_partial.callbacks._timeline import Recorder
from flax_partial.runs import timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent import futures
    from pathlib import Path

    from flax_partial.callbacks._schedule import Retention

logger = logging.getLogger(__name__)

_LAST_HOOKS = ("on_train_end", "teardown")  # after which nobody may come by to write what is noted


@dataclass
class _Entry:
    """An open or closed checkpoint.

    Attributes:
      checkpoint: The checkpoint.
      callbacks: Those that save into it, by state key; empty until the first of them is done.
      awaited: State keys of those that are not done; None until the first is.
    """

    checkpoint: PendingCheckpoint
    callbacks: dict[str, Participant]
    awaited: set[str] | None = None


class FinalizeHook:
    """Shared by the callbacks that save into the same checkpoints: finalizes each of them once.

    Callbacks that save into one directory share one hook. It is never called by a trainer.

    Under `jax.distributed` every process has its own callbacks and hook, whose loops save at the
    same steps; each saves what its own trainer has. A checkpoint is finalized when all processes
    have saved their part of it. Where a save fails in one of them, it is given up in all.

    Attributes:
      preemption: Whether its callbacks are to save for the last time.
      rescued_step: The step that they save on an exception; None before one.
    """

    def __init__(self, *, timeout_secs: float = 90.0) -> None:
        """Prepares a hook.

        Args:
          timeout_secs: For how many seconds a checkpoint waits, in the background, for the other
            processes to save their part of it; then it is given up.
        """
        self._timeout_secs = timeout_secs
        self._lock = threading.RLock()
        self._keys: Counter[str] = Counter()
        self._joined: dict[str, Participant] = {}
        self._entries: dict[Path, _Entry] = {}
        self._runs: dict[Path, str] = {}
        self._recorders: dict[Path, Recorder] = {}
        self._held = HeldTime()
        self._finished: list[tuple[CheckpointReport, HeldTime]] = []
        self._worker = Worker("flax_partial_finalize")
        self._remover = Worker("flax_partial_remove")
        self._resumed: dict[Path, int] = {}
        self._told: Counter[str] = Counter()
        self._writing: dict[Path, PendingCheckpoint] = {}
        self._bar = progress.Bar("Writing checkpoints")
        self.preemption = Preemption()
        self.rescued_step: int | None = None
        self._jobs: dict[Path, futures.Future[None]] = {}

    @property
    def reports(self) -> tuple[CheckpointReport, ...]:
        """What each checkpoint finalized so far holds and cost, in the order of finalizing."""
        return tuple(
            replace(report, blocked_secs=held.secs) for report, held in tuple(self._finished)
        )

    def new_reports(self, reader: str) -> tuple[CheckpointReport, ...]:
        """Those that this reader has not been given before; costs nothing if there are none."""
        with self._lock:
            first, self._told[reader] = self._told[reader], len(self._finished)
            if first == len(self._finished):
                return ()
            return self.reports[first:]

    def wait(self, *, show_progress: bool = False) -> None:
        """Finishes what is closed, drops what is open, and waits until nothing is under way."""
        self._settle(self._entries.values())
        bar = self._bar if show_progress else None
        progress.wait(tuple(self._jobs.values()), bar, self._written)
        with self._lock:
            self._jobs.clear()
            self._writing.clear()
        self._worker.finish()
        self._remover.finish()
        for recorder in tuple(self._recorders.values()):
            recorder.flush()

    def recorder(self, directory: Path) -> Recorder:
        """Records the timeline of a run's directory."""
        return self._recorders.get(directory) or self._recorders.setdefault(
            directory, Recorder(directory)
        )

    def show_progress(self) -> None:
        """Draws how much is written of what is under way; takes the bar away when all is."""
        with self._lock:
            done, total = self._written()
            is_under_way = done < total or not all(job.done() for job in self._jobs.values())
        if is_under_way:
            self._bar.update(done, total, while_waiting=False)
        else:
            self._bar.close()

    def _written(self) -> tuple[int, int]:
        with self._lock:
            pending = [entry.checkpoint for entry in self._entries.values()]
            pending += [self._writing[path] for path, job in self._jobs.items() if not job.done()]
        amounts = [checkpoint.written() for checkpoint in pending]
        return sum(done for done, _ in amounts), sum(total for _, total in amounts)

    def leave(self) -> None:
        """Lets saves in flight finish, and leaves what is not finalized to the next run.

        Where a save has failed, the other processes are told, as if its step had ended.
        """
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.checkpoint.wait()
            logger.warning("Left %s unfinished, for the next run.", entry.checkpoint.path)
            entry.checkpoint.give_up()
        self.wait()

    @property
    def awaits_callbacks(self) -> bool:
        """Whether callbacks that are joined have yet to add to what others have saved."""
        with self._lock:
            return any(
                entry.awaited and entry.awaited <= self._joined.keys()
                for entry in self._entries.values()
            )

    def unique_key(self, key: str) -> str:
        """Makes a state key differ from those of the callbacks made before."""
        self._keys[key] += 1
        return key if self._keys[key] == 1 else f"{key}#{self._keys[key]}"

    def join(self, callback: Participant) -> None:
        """Counts a callback among those whose part of a checkpoint is waited for.

        Raises:
          ValueError: It and another one of the same directory want to keep different checkpoints.
        """
        with self._lock:
            for other in self._joined.values():
                _check_agree(callback, other)
            self._joined[callback.state_key] = callback

    def part(self, callback: Participant) -> None:
        """The opposite of `join`."""
        with self._lock:
            self._joined.pop(callback.state_key, None)

    def recover(self, directory: Path) -> None:
        """Finalizes or drops what an ended run left unfinished in `directory`."""
        self._wait_for(directory)
        with self._lock:
            live = set(self._entries)
        self._runs[directory] = _directory.recover(directory, live=live)
        self.recorder(directory).begin(self._runs[directory])
        self._tidy(_directory.sweep, directory)

    def name_of(self, callback: Participant) -> str:
        """Under which name all processes know a callback in this run, and no other run does."""
        run = self._runs.get(callback.directory, "")
        return f"{callback.directory.absolute()} {callback.state_key} {run}"

    def resumed(self, directory: Path, step: int) -> None:
        """Takes note that training goes on from a step: it stays until a newer one is finalized."""
        self._resumed[directory] = step

    def prune(self, callback: Participant) -> None:
        """Removes what a callback does not want to keep, in the background."""
        self._tidy(self._prune, callback.directory, callback.retention)

    def advance(self, directory: Path, step: int) -> None:
        """Takes note that training is at `step`: what earlier ones left open stays incomplete."""
        with self._lock:
            before = [
                entry
                for entry in self._entries.values()
                if entry.checkpoint.path.parent == directory and entry.checkpoint.step < step
            ]
        if before:
            self._settle(before)

    def open(self, callback: Participant, *, step: int, epoch: int) -> PendingCheckpoint:
        """The checkpoint of a step, which is new if this is the first callback to save into it.

        A new one waits until those before it are finalized: where training saves faster than the
        storage takes it, it slows down, instead of piling up snapshots of the state in memory.
        """
        path = callback.directory / str(step)
        with self._lock:
            entry = self._entries.get(path)
            if entry is not None:
                return entry.checkpoint
            self.advance(callback.directory, step)
            run = self._runs.get(callback.directory, "")
            record = self.recorder(callback.directory)
            checkpoint = PendingCheckpoint(path, step=step, epoch=epoch, run=run, record=record)
            self._entries[path] = _Entry(checkpoint, {})
            self._held = checkpoint.held
        self._wait_for(callback.directory, bar=self._bar if callback.shows_progress else None)
        try:
            checkpoint.before = _directory.check_is_newer(callback.directory, step)
        except (fp.CheckpointExistsError, OSError) as error:
            checkpoint.fail(error, [callback])
        return checkpoint

    def close(
        self,
        callback: Participant,
        checkpoint: PendingCheckpoint,
        groups: Mapping[str, Any],
        *,
        trainer: Any,
        epoch_ends: bool,
    ) -> None:
        """Saves the last groups of a callback; after the last callback the checkpoint is closed.

        Args:
          callback: The one that is done.
          checkpoint: What `open` returned.
          groups: Group to the tree it holds.
          trainer: Tells which callbacks save this step, and the metrics.
          epoch_ends: Whether the step is the last of its epoch: its metrics are waited for.
        """
        with self._lock:
            entry = self._entries[checkpoint.path]
            if entry.awaited is None:
                entry.callbacks = self._due(callback, checkpoint, trainer, epoch_ends=epoch_ends)
                entry.awaited = set(entry.callbacks)
        checkpoint.close(callback, groups, callbacks=entry.callbacks)
        with self._lock:
            entry.awaited.discard(callback.state_key)
            if not entry.awaited and not epoch_ends:
                self._finish(entry, trainer.callback_metrics)

    def epoch_ended(self, trainer: Any) -> None:
        """Finalizes the closed checkpoints, with the metrics of the whole epoch."""
        with self._lock:
            for entry in list(self._entries.values()):
                if entry.awaited == set():
                    self._finish(entry, trainer.callback_metrics)

    def held(self, directory: Path, secs: float, hook: str) -> None:
        """Takes note of time that training spent, until now, in a hook of a callback."""
        with self._lock:
            held = self._held
            held.secs += secs
        recorder = self.recorder(directory)
        recorder.held(held.step, secs, hook)
        if hook in _LAST_HOOKS:
            recorder.flush()

    def _due(
        self,
        callback: Participant,
        checkpoint: PendingCheckpoint,
        trainer: Any,
        *,
        epoch_ends: bool,
    ) -> dict[str, Participant]:
        others = {
            key: other
            for key, other in self._joined.items()
            if other.directory == callback.directory
            and other.is_due(trainer, checkpoint.step, epoch_ends=epoch_ends)
        }
        return {**others, callback.state_key: callback}

    def _wait_for(self, directory: Path, *, bar: progress.Bar | None = None) -> None:
        with self._lock:
            jobs = [job for path, job in self._jobs.items() if path.parent == directory]
        progress.wait(jobs, bar, self._written)

    def _settle(self, entries: Iterable[_Entry]) -> None:
        """Finalizes those that are closed, drops those that are open."""
        with self._lock:
            for entry in list(entries):
                if entry.awaited == set():
                    self._finish(entry, {})
                else:
                    self._submit(entry, self._drop)

    def _finish(self, entry: _Entry, metrics: Mapping[str, Any]) -> None:
        self._submit(entry, self._finalize, dict(metrics))

    def _submit(self, entry: _Entry, work: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            path = entry.checkpoint.path
            del self._entries[path]
            self._jobs = {path: job for path, job in self._jobs.items() if not job.done()}
            self._writing = {path: self._writing[path] for path in self._jobs}
            self._writing[path] = entry.checkpoint
            self._jobs[path] = self._worker.submit(functools.partial(work, entry, *arguments))

    def _finalize(self, entry: _Entry, metrics: Mapping[str, Any]) -> None:
        checkpoint, callbacks = entry.checkpoint, list(entry.callbacks.values())
        try:
            report = checkpoint.finalize(
                callbacks[0], finite_numbers(metrics), timeout_secs=self._timeout_secs
            )
        except Exception as error:  # noqa: BLE001 - the callbacks decide what follows
            checkpoint.fail(error, callbacks)
            self._given_up(checkpoint)
            if jax.process_count() > 1 and not isinstance(error, fp.IncompleteCheckpointError):
                why = f"a save failed ({error})."
                _directory.drop_unless_complete(checkpoint.path, checkpoint.step, why)
            return
        if report is None:
            self._given_up(checkpoint)
            why = f"a save failed ({checkpoint.error})."
            _directory.drop_unless_complete(checkpoint.path, checkpoint.step, why)
            return
        self._finished.append((report, checkpoint.held))
        self.recorder(report.path.parent).ended(
            report.step,
            timeline.FINALIZED,
            began_at=report.finalized_at - report.finalize_secs,
            ended_at=report.finalized_at,
        )
        log(report)
        self._resumed.pop(report.path.parent, None)
        for callback in callbacks:
            check_score(report.path, report.metrics, callback.retention.monitor)
            self.prune(callback)

    def _tidy(self, work: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: the next run does it
            self._remover.submit(functools.partial(work, *arguments))

    def _prune(self, directory: Path, retention: Retention) -> None:
        resumed = self._resumed.get(directory)
        protected = () if resumed is None else (resumed,)
        _directory.prune(directory, retention, protected=protected)

    def _drop(self, entry: _Entry) -> None:
        checkpoint = entry.checkpoint
        checkpoint.wait()
        self._given_up(checkpoint)
        _directory.drop_unless_complete(checkpoint.path, checkpoint.step, "its step never ended.")

    def _given_up(self, checkpoint: PendingCheckpoint) -> None:
        now = time.time()
        self.recorder(checkpoint.path.parent).ended(
            checkpoint.step, timeline.GIVEN_UP, began_at=now, ended_at=now
        )


def _check_agree(one: Participant, other: Participant) -> None:
    if one.directory != other.directory or not (one.retention.removes and other.retention.removes):
        return
    if one.retention != other.retention:
        raise ValueError(
            f"Two callbacks want to keep different checkpoints of {one.directory}: "
            f"{one.retention} and {other.retention}. Give these options to one of them only."
        )
