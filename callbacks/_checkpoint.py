"""One checkpoint on its way: its saves in flight, who has yet to add to it, what it has cost."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.profiler import TraceAnnotation

import flax_partial as fp
from flax_partial.callbacks import _groups, _rows, _stacked, _timeline
from flax_partial.callbacks._reports import CheckpointReport, HeldTime
from flax_partial.runs import completeness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from flax_partial.callbacks._schedule import Retention


_OWN_LEAF = "checkpoint_step"


class Participant(Protocol):
    """What a checkpoint, and the hook, know of a callback that saves into it."""

    directory: Path
    retention: Retention
    options: fp.SaveOptions | None
    reuse_unchanged: bool
    shows_progress: bool

    @property
    def state_key(self) -> str:
        """Tells this callback from the others of its hook, in every run."""

    def is_due(self, trainer: Any, step: int, *, epoch_ends: bool) -> bool:
        """Whether this callback saves `step`."""

    def failed(self, error: BaseException) -> None:
        """Takes note, in any thread, that a checkpoint of this callback will not be."""


class PendingCheckpoint:
    """The checkpoint of one step while it is being written.

    Saves may come from any thread. The first failure decides: nothing more is saved, and the
    checkpoint is never finalized.

    Attributes:
      path: Where it will be.
      step: Its step.
      epoch: Its epoch, the first being 0.
      run: Name of the run: what another run of these processes agreed on, or did not, is past.
      names: Names of the leaves saved into it.
      before: The checkpoint before it, whose data it may share; None if there is none.
      held: For how long it has held training so far.
      error: Why it will not be; None while it may.
    """

    def __init__(
        self, path: Path, *, step: int, epoch: int, run: str, record: _timeline.Recorder
    ) -> None:
        self.path = path
        self.step = step
        self.epoch = epoch
        self.run = run
        self.names: set[str] = set()
        self.before: Path | None = None
        self.held = HeldTime(step)
        self.error: BaseException | None = None
        self._record = record
        self._lock = threading.Lock()
        self._groups: dict[str, list[str]] = {}
        self._pieces: Counter[str] = Counter()
        self._saves: dict[str, fp.SaveHandle] = {}
        self._sizes: dict[str, int] = {}
        self._messages: list[fp.SaveHandle] = []
        self._owners: dict[_Claim, str] = {}
        self._carrier: Any = None

    def holds(self, path: _groups.KeyPath, leaf: Any) -> bool:
        """Whether a leaf was saved into it; of a stacked one, the row or rows that `leaf` is."""
        name = _groups.leaf_name(path)
        if not isinstance(leaf, fp.Slice | _rows.Row):
            return name in self.names
        return _whole(name) in self._owners or all(
            claim in self._owners for claim in _claims(path, leaf)
        )

    def save(self, participant: Participant, group: str, tree: Any) -> None:
        """Saves a group in the background; returns once its arrays may be donated.

        What another callback has saved is left out: a trainer may hand every layer to all of them.
        """
        leaves = self._claim(participant, tree)
        if leaves:
            name = self._enter(participant, group)
            self._save_group(participant, name, leaves, {})

    def close(
        self, participant: Participant, groups: Mapping[str, Any], *, callbacks: Iterable[str]
    ) -> None:
        """Saves the last groups of a callback, and lists all it has saved for a later process.

        Args:
          participant: The callback.
          groups: Group to the tree it holds; empty where all was streamed.
          callbacks: State keys of all callbacks that save into this checkpoint.
        """
        claimed = {group: self._claim(participant, tree) for group, tree in groups.items()}
        entered = {self._enter(participant, name): rest for name, rest in claimed.items() if rest}
        key = participant.state_key
        closing = completeness.closing(callbacks, callback=key, groups=self._groups.get(key, []))
        last = next(reversed(entered), None)
        for group, leaves in entered.items():
            self._save_group(participant, group, leaves, closing if group == last else {})
        has_a_say = self.names or jax.process_count() > 1  # others may hold all there is to save
        if not entered and has_a_say and self.error is None:
            message = self._message({"session": closing})
            handle = self._submit(participant, lambda: message)
            self._messages += [handle] if handle else []

    def written(self) -> tuple[int, int]:
        """How many bytes of how many, of those that this process saves, are written."""
        saves = list(self._saves.items())
        done = sum(self._sizes[group] for group, handle in saves if handle.done())
        return done, sum(self._sizes[group] for group, _ in saves)

    def wait(self) -> None:
        """Waits until no save is in flight; the first failure is in `error` then."""
        for handle in [*self._saves.values(), *self._messages]:
            handle.exception()

    def fail(self, error: BaseException, participants: Iterable[Participant]) -> None:
        """Gives the checkpoint up, and tells the callbacks about the first reason for it."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        error.add_note(f"This is about the checkpoint of step {self.step}, {self.path}.")
        for participant in participants:
            participant.failed(error)

    def finalize(
        self, participant: Participant, metrics: Mapping[str, float], *, timeout_secs: float
    ) -> CheckpointReport | None:
        """Waits for all saves, in all processes, and finalizes.

        Args:
          participant: One of the callbacks.
          metrics: Name to number, to store with the checkpoint.
          timeout_secs: For how many seconds to wait for other processes.

        Returns:
          What was finalized; None if a save of this process has failed: the session is left then.

        Raises:
          EmptyStateError: No callback saved anything.
          IncompleteCheckpointError: Some process was not done in time.
          PartialCheckpointError, OSError: Finalize, or a save of another process, failed; the
            session is left as it was.
        """
        begun = [0.0]

        def save_all() -> list[str]:
            self._require_saved(participant, metrics)
            begun[0] = time.perf_counter()
            return sorted(self.names)

        try:
            self._agree(save_all, timeout_secs)
        except Exception:
            if self.error is not None:
                return None
            raise
        finalize_secs = time.perf_counter() - begun[0]
        finalized_at = time.time()
        saves = {group: handle.result() for group, handle in self._saves.items()}
        return CheckpointReport(
            path=self.path,
            step=self.step,
            epoch=self.epoch,
            saves=saves,
            bytes=fp.metadata(self.path).bytes,
            reused_bytes=sum(save.reused_bytes for save in saves.values()),
            metrics=metrics,
            blocked_secs=self.held.secs,
            write_secs=sum(save.write_secs for save in saves.values()),
            finalize_secs=finalize_secs,
            finalized_at=finalized_at,
        )

    def give_up(self) -> None:
        """Tells the other processes, if any, that a save of this one has failed, if one has.

        It waits for none of them: they may have given up before, and never come to this step.
        """
        error = self.error
        if error is None or jax.process_count() == 1:
            return

        def fail() -> list[str]:
            raise error

        with contextlib.suppress(Exception):  # the error is known here
            self._agree(fail, timeout_secs=0)

    def _agree(self, ready: Callable[[], list[str]], timeout_secs: float) -> None:
        subject = f"checkpoint {self.path.absolute()} {self.run}"
        fp.agree(subject, ready=ready, act=self._commit, timeout_secs=timeout_secs)

    def _require_saved(self, participant: Participant, metrics: Mapping[str, float]) -> None:
        """Waits for all saves of this process; raises why there is no checkpoint of it."""
        self.wait()
        if self.error is not None:
            raise self.error
        if metrics:  # not in the background: at the interpreter's exit, no thread can be started
            message = self._message({"metrics": metrics})
            fp.save(self.path, **self._how(participant), **message)

    def _commit(self, names: Mapping[int, Sequence[str]]) -> None:
        """Finalizes what all processes have saved, given the names of their leaves."""
        expected = sorted({name for of_one in names.values() for name in of_one})
        if not expected:
            raise fp.EmptyStateError("No callback had anything to save.")
        fp.finalize(self.path, expect=expected, processes=[jax.process_index()])

    def _claim(self, participant: Participant, tree: Any) -> _groups.Leaves:
        """Returns the leaves of a tree, but for those that another callback saves."""
        leaves = _groups.flatten(tree)
        with self._lock:
            owners = [self._owner(participant, *leaf) for leaf in leaves]
            mine = [
                leaf
                for leaf, owner in zip(leaves, owners, strict=True)
                if owner == participant.state_key
            ]
            self.names.update(_groups.leaf_name(path) for path, _ in mine)
        return mine

    def _owner(self, participant: Participant, path: _groups.KeyPath, leaf: Any) -> str:
        """Returns who saved the first row of a leaf before; the participant, if nobody did."""
        key = participant.state_key
        first, *others = _claims(path, leaf)
        for claim in others:
            self._owners.setdefault(claim, key)
        return self._owners.setdefault(first, key)

    def _enter(self, participant: Participant, group: str) -> str:
        """Gives each save a name of its own: a group may come in several pieces."""
        with self._lock:
            self._pieces[group] += 1
            piece = self._pieces[group]
            name = group if piece == 1 else f"{group}#{piece}"
            self._groups.setdefault(participant.state_key, []).append(name)
            return name

    def _save_group(
        self,
        participant: Participant,
        group: str,
        leaves: _groups.Leaves,
        closing: Mapping[str, Any],
    ) -> None:
        if self.error is not None:
            return
        saved = completeness.saved(callback=participant.state_key, group=group)
        metadata = self._metadata({"session": {**saved, **closing}})

        def what() -> dict[str, Any]:
            return {"state": _groups.subtree(_stacked.cut(leaves)), "custom_metadata": metadata}

        where = _timeline.where_is(leaves)

        def record(handle: Future[fp.SaveReport]) -> None:
            if handle.exception() is None:
                self._record.saved(self.step, group, where, handle.result())

        with TraceAnnotation("flax_partial.save_async", group=group):
            handle = self._submit(participant, what)
        if handle is not None:
            handle.add_done_callback(record)
            self._sizes[group] = sum(_bytes_of(leaf) for _, leaf in leaves)
            self._saves[group] = handle
            self._carrier = self._carrier or _carrier(leaves)

    def _message(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What saves custom metadata alone.

        Metadata travels with leaves: a small one that is saved already is saved once more. Where
        all leaves are cut into slices, which cannot be, a leaf of our own is.
        """
        state = self._carrier or {_OWN_LEAF: self.step}
        return {"state": state, "custom_metadata": self._metadata(metadata), "replace": True}

    def _metadata(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return {"step": self.step, "epoch": self.epoch, **more}

    def _how(self, participant: Participant) -> dict[str, Any]:
        """How a callback's groups are saved."""
        reuse = self.before if participant.reuse_unchanged else None
        return {"options": participant.options, "reuse": reuse}

    def _submit(
        self, participant: Participant, what: Callable[[], Mapping[str, Any]]
    ) -> fp.SaveHandle | None:
        try:
            handle = fp.save_async(self.path, **self._how(participant), **what())
        except Exception as error:  # noqa: BLE001 - whatever it is, the callback decides what follows
            self.fail(error, [participant])
            return None

        def finished(handle: Future[fp.SaveReport]) -> None:
            error = handle.exception()
            if error is not None:
                self.fail(error, [participant])

        handle.add_done_callback(finished)
        return handle


_Claim = tuple[str, _rows.Axes, _rows.Index]
"""Name of a leaf, the axes along which it is cut, and which row: what is saved once."""


def _whole(name: str) -> _Claim:
    return name, (), ()


def _claims(path: _groups.KeyPath, leaf: Any) -> list[_Claim]:
    """What of a leaf is there: some of its rows, or all of it."""
    name = _groups.leaf_name(path)
    if isinstance(leaf, _rows.Row):
        return [(name, leaf.axes, leaf.start)]
    if not isinstance(leaf, fp.Slice):
        return [_whole(name)]
    try:
        axes, held = _rows.rows_of(leaf)
    except (TypeError, AttributeError, IndexError, ValueError):  # saving it will say what is wrong
        return [_whole(name)]
    return [(name, axes, row) for row in held] or [_whole(name)]


def _carrier(leaves: _groups.Leaves) -> Any:
    """The smallest whole leaf, copied: training may donate it before it is saved again."""
    whole = [(path, leaf) for path, leaf in leaves if _is_whole(leaf)]
    if not whole:
        return None
    path, leaf = min(whole, key=lambda item: getattr(item[1], "size", 1))
    if isinstance(leaf, jax.Array):
        leaf = jax.device_put(leaf, leaf.sharding, may_alias=False)
    elif isinstance(leaf, np.ndarray):
        leaf = leaf.copy()
    return _groups.subtree([(path, leaf)])


def _is_whole(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex | str)


def _bytes_of(leaf: Any) -> int:
    """What this process writes of a leaf."""
    if isinstance(leaf, _rows.Row):
        count: int = math.prod(leaf.value.shape[axis] for axis in leaf.axes)
        return _bytes_of(leaf.value) // count
    if isinstance(leaf, fp.Slice):
        return _bytes_of(leaf.value)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        shards = leaf.addressable_shards
        return sum(_bytes_of(shard.data) for shard in shards if shard.replica_id == 0)
    return int(getattr(leaf, "nbytes", 0))
