"""Saves each layer of a training step the moment it is ready, as one checkpoint.

The hooks are Lightning's, by name and signature; two calls are added, with which a trainer streams.

Which step a layer belongs to: steps are counted as the trainer's `global_step` is when
`on_train_batch_end` is called, so step 1 is the first. What is streamed belongs to the batch under
way: its step is one more than `global_step` was when the batch began, no matter whether the trainer
counts before or after it streams.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

import flax_partial as fp
from flax_partial.callbacks import _directory, _groups, _stacked, _state
from flax_partial.callbacks._clock import Clock
from flax_partial.callbacks._finished import Finished
from flax_partial.callbacks._metrics import send
from flax_partial.callbacks._schedule import Retention, Schedule
from flax_partial.callbacks.finalize_hook import FinalizeHook
from flax_partial.callbacks.progress import Bar

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from datetime import timedelta

    from flax_partial.callbacks._checkpoint import PendingCheckpoint
    from flax_partial.callbacks._metrics import OnMetrics
    from flax_partial.callbacks._reports import CheckpointReport

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def _held(
    method: Callable[Concatenate[PartialCheckpointCallback, P], None],
) -> Callable[Concatenate[PartialCheckpointCallback, P], None]:
    """Counts the time a hook takes, and raises in it what has failed since the hook before."""
    name = method.__name__.removeprefix("_")

    @functools.wraps(method)
    def hook(self: PartialCheckpointCallback, /, *args: P.args, **kwargs: P.kwargs) -> None:
        begun = time.perf_counter()
        try:
            method(self, *args, **kwargs)
        finally:
            self.finalizer.held(self.directory, time.perf_counter() - begun, name)
        self._raise_failure()

    return hook


def _hook(
    method: Callable[Concatenate[PartialCheckpointCallback, Any, P], None],
) -> Callable[Concatenate[PartialCheckpointCallback, Any, P], None]:
    """A hook of the training thread: `_held`, and then tells what has been finalized meanwhile."""
    held = _held(method)

    @functools.wraps(method)
    def hook(
        self: PartialCheckpointCallback, trainer: Any, /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        held(self, trainer, *args, **kwargs)
        if self.shows_progress:
            self.finalizer.show_progress()
        self._tell_costs(trainer)

    return hook


class PartialCheckpointCallback:
    """Checkpoints a training loop group by group, into `directory/<step>/`.

    A trainer that can stream calls `on_layer_ready` and `on_optimizer_state_ready` in each step,
    from its last backward pass on; what it did not stream is taken from its state when the step
    ends. A step's parts become a checkpoint, all or none, in the background. A directory belongs to
    one run: saving a step that is not newer than all it holds is refused.

    Models that are scanned over their layers, or pipelined by stacking them, have one leaf for all
    layers: `[layers, ...]` or `[repeats, stages, ...]`. With `stacked={"params.layers": 0}` each
    leaf below `params.layers` is saved row by row along its axis 0, and with it whatever else of
    the state ends in its path and has as many rows: its moments, its running average. A group is
    then one row of them all (`params.layers.3`). With `stacked={"params.layers": (0, 1)}` a row is
    one stage of one repeat (`params.layers.3.1`). Of a leaf that is spread over processes, each
    saves its own shards of rows. A row is cut out of the shards that hold it when
    it is its turn to be saved, so that `SaveOptions(max_inflight_bytes=...)` bounds what a
    checkpoint of any size takes of the host's memory, and of each device's as many bytes at most:
    past it, the step's `on_train_batch_end` waits for the storage. In the checkpoint such a leaf is
    one array, as without `stacked`. A leaf that lacks the axis is saved whole, and so are PRNG
    keys. A trainer that streams may hand over a stacked leaf whole, which is cut likewise, or rows
    of it as `fp.Slice`; the rows that it did not stream are taken when the step ends.

    Attributes:
      finalizer: The hook that finalizes.
      failed_saves: Number of checkpoints that were given up.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_n_epochs: int | None = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        group_by: _groups.GroupBy | None = None,
        stacked: _stacked.Stacked | None = None,
        state_fn: _state.StateFn | None = None,
        keep_last: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int | None = None,
        keep_every_n_steps: int | None = None,
        keep_time_interval: timedelta | None = None,
        save_on_preemption: bool = True,
        save_on_exception: bool = False,
        finalizer: FinalizeHook | None = None,
        options: fp.SaveOptions | None = None,
        reuse_unchanged: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        on_metrics: OnMetrics | None = None,
        progress: bool = False,
    ) -> None:
        """Prepares a callback; nothing is written before training begins.

        Args:
          directory: A run's directory, which holds a checkpoint a step.
          every_n_epochs: Save at the end of each n-th epoch; None for no epoch.
          every_n_train_steps: Save after each n-th step as well; None for none.
          train_time_interval: Save as well once so much time has gone by since the last save. Of
            several processes the first one's clock counts, and all save the same step; there it
            counts from `on_fit_start`.
          group_by: From a leaf's key path to the group it is saved with, for what is not streamed;
            by default, layer by layer.
          stacked: From the name of a leaf or subtree ("params.layers") to the axis along which its
            leaves stack layers, or a tuple of axes; negative counts from the end. The longest name
            that fits counts.
          state_fn: From trainer and module to the tree to save, in which NNX objects may stand; by
            default, an NNX module with `trainer.optimizer`, a Flax `TrainState`, or
            `trainer.state`.
          keep_last: Keep so many of the newest checkpoints. Without this and the other three that
            say what to keep, all are kept; with any of them, the newest and what any one keeps.
          monitor: The one of the trainer's `callback_metrics` that scores a checkpoint.
          mode: Whether the best score is the smallest or the largest.
          save_top_k: Keep so many of the best checkpoints.
          keep_every_n_steps: Keep the first checkpoint at or after each n-th step.
          keep_time_interval: Keep the oldest checkpoint, and after it always the first that is
            finalized so much later than the one kept before.
          save_on_preemption: When the process gets SIGTERM, save the step under way once it is
            finished, finalize, and stop: by `trainer.should_stop = True`, or, where the trainer has
            no such attribute, `SystemExit(143)`. A handler that was there before is called then,
            in place of that exit. Listens from `on_fit_start` to the end of training.
          save_on_exception: When training fails, save the last step that was finished. Its arrays
            are held until the next one is; those that the step under way was given to write over
            (donated) cannot be saved, and that is said.
          finalizer: Shared by all callbacks that save into one directory; by default, one of its
            own.
          options: How parts are written.
          reuse_unchanged: Whether leaves that are to the byte what they were in the checkpoint
            before (frozen layers, the base of an adapter) are not written again: both checkpoints
            share the files that hold them, and either may be removed.
          on_save_error: Whether a failed save is raised at the next hook, or logged and counted.
          on_metrics: Called in a hook, once a checkpoint is finalized, with its step and, before
            that, `checkpoint/blocked_secs`, `.../write_secs`, `.../bytes`, `.../finalize_secs`; by
            default, `log_metrics` of the trainer's `loggers` or `logger`, if it has any. What it
            raises is raised by that hook, and harms no checkpoint.
          progress: Show a bar of bytes while training waits for checkpoints, or for one to be
            loaded, for longer than a second; below a bar of tqdm's, also while training goes on.

        Raises:
          ValueError: An option has a value that makes no sense, alone or with another.
          TypeError: `stacked` maps something else than names to numbers, or tuples of them.
        """
        if on_save_error not in ("raise", "warn"):
            raise ValueError(f"on_save_error is {on_save_error!r}; it must be 'raise' or 'warn'.")
        self.directory = Path(directory)
        self.retention = Retention(
            keep_last, monitor, mode, save_top_k, keep_every_n_steps, keep_time_interval
        )
        self.options = options
        self.reuse_unchanged = reuse_unchanged
        self.finalizer = finalizer or FinalizeHook()
        self.failed_saves = 0
        self._schedule = Schedule(every_n_epochs, every_n_train_steps, train_time_interval)
        self._clock = Clock(train_time_interval) if train_time_interval is not None else None
        self._group_by = group_by
        self._stacked = _stacked.check(stacked or {})
        self._state_fn = state_fn
        self._on_save_error = on_save_error
        self._on_metrics = on_metrics
        self._save_on_preemption = save_on_preemption
        self._save_on_exception = save_on_exception
        self._finished: Finished | None = None
        self.shows_progress = progress
        self._state_key = self.finalizer.unique_key(
            f"{type(self).__qualname__}({every_n_epochs=}, {every_n_train_steps=}, {monitor=})"
        )
        self._failures: deque[BaseException] = deque()
        self._has_recovered = False
        self._step_before: int | None = None
        self._last_saved: int | None = None

    # What a trainer that streams calls.

    def will_save(self, trainer: Any) -> bool:
        """Whether the step under way is saved: cheap enough to ask at every layer."""
        step = self._step_before_batch(trainer) + 1
        return self.is_due(trainer, step, epoch_ends=trainer.is_last_batch)

    def on_layer_ready(self, trainer: Any, name: _groups.Name, tree: Any) -> None:
        """Saves a layer's parameters as they are after the step under way, if it is to be saved.

        Returns once the arrays may be donated, deleted or written over; they need not be computed
        yet. May be called from any thread, in any order, once a step for each name.

        Args:
          trainer: The trainer.
          name: Where the layer stands below "params", such as "blocks.3".
          tree: Its parameters.
        """
        if self.will_save(trainer):
            self._stream(trainer, "params", name, tree)

    def on_optimizer_state_ready(self, trainer: Any, name: _groups.Name, tree: Any) -> None:
        """Saves a layer's optimizer state, as `on_layer_ready` does, below "opt_state"."""
        if self.will_save(trainer):
            self._stream(trainer, "opt_state", name, tree)

    # Lightning's hooks.

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Joins the callbacks that share its hook."""
        self.finalizer.join(self)

    @_hook
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Finalizes or drops what an ended run has left, and removes what is not to be kept."""
        self.finalizer.join(self)
        self._step_before = trainer.global_step
        self.recover()
        self.finalizer.prune(self)
        if self._clock is not None:
            self._clock.start(self.finalizer.name_of(self), trainer.global_step)
        if self._save_on_preemption:
            self.finalizer.preemption.watch(self.state_key)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Takes note of the step that training, restored by now, starts from."""
        self._step_before = trainer.global_step

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Takes note of the step that the batch follows."""
        self._step_before = trainer.global_step
        self.finalizer.recorder(self.directory).step_began()

    @_hook
    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves what was not streamed of a step that is to be saved."""
        step = trainer.global_step
        self.finalizer.advance(self.directory, step)
        self._reach(step, "on_train_batch_end")
        if self.is_due(trainer, step, epoch_ends=trainer.is_last_batch):
            self._save(trainer, module, step, epoch_ends=trainer.is_last_batch)
        if self._save_on_exception:
            self._finished = Finished.of(trainer, module, self._state_fn)
        self._step_before = step
        self.finalizer.recorder(self.directory).step_ended(step)
        self._stop_after_last(trainer, step)

    @_hook
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Finalizes; saves first if the epoch ended with a batch that did not look its last."""
        step = trainer.global_step
        self._reach(step, "on_train_epoch_end")
        if self.is_due(trainer, step, epoch_ends=True):
            self._save(trainer, module, step, epoch_ends=True)
        self.finalizer.epoch_ended(trainer)
        self._stop_after_last(trainer, step)

    @_hook
    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Waits until every checkpoint is finalized."""
        step = trainer.global_step
        self._reach(step, "on_train_end")
        if self._is_last(step) and step not in (0, self._last_saved):
            self._save(trainer, module, step, epoch_ends=False)
        try:
            self._stop_after_last(trainer, step)
        finally:
            self._end()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Lets saves in flight finish, and leaves what is not finalized to the next run.

        With `save_on_exception` it saves the last finished step before, if that can be had.
        """
        self._stop_listening()
        if self._save_on_exception:
            self._rescue(trainer)
        self.finalizer.part(self)
        if not (self._save_on_exception and self.finalizer.awaits_callbacks):
            self.finalizer.leave()
        self._finished = None
        while self._failures:
            logger.error("A checkpoint had failed, too.", exc_info=self._failures.popleft())
        try:
            self._tell_costs(trainer)
        except Exception:
            logger.exception("What checkpoints cost could not be told.")

    @_hook
    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Waits until every checkpoint is finalized."""
        self._end()

    @property
    def state_key(self) -> str:
        """Tells this callback from others, in a trainer and in a checkpoint."""
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """What a trainer's own checkpoint has to hold of this callback."""
        return {"last_saved": self._last_saved, "failed_saves": self.failed_saves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._last_saved = state_dict["last_saved"]
        self.failed_saves = state_dict["failed_saves"]

    # What a user calls.

    @property
    def reports(self) -> tuple[CheckpointReport, ...]:
        """What each checkpoint of its hook holds and cost."""
        return self.finalizer.reports

    @property
    def last_model_path(self) -> str:
        """The newest finalized checkpoint of the directory; "" while there is none."""
        return self._path_of(_directory.choose(self.directory, self.retention, "latest"))

    @property
    def best_model_path(self) -> str:
        """The best checkpoint that is there, by `monitor`; without one, the newest; "" if none.

        Like `last_model_path` it is looked up on disk: after a restart it is the same.
        """
        if self.retention.monitor is None:
            return self.last_model_path
        return self._path_of(_directory.choose(self.directory, self.retention, "best"))

    @property
    def best_model_score(self) -> float | None:
        """The score that `best_model_path` was stored with; None without a score or a `monitor`."""
        steps = fp.steps(self.directory)
        known = _directory.scores(self.directory, steps, self.retention.monitor)
        best = self.retention.ranked(known, known)[:1]
        return known[best[0]] if best else None

    def _path_of(self, step: int | None) -> str:
        return "" if step is None else str(self.directory / str(step))

    def recover(self) -> None:
        """Finalizes or drops what an ended run has left unfinished, as `on_fit_start` does."""
        self.finalizer.recover(self.directory)
        self._has_recovered = True

    def restore(
        self, target: Any = None, *, which: Literal["latest", "best"] | int = "latest"
    ) -> tuple[Any, int] | None:
        """Loads the newest or best checkpoint, or that of a step; recovers first.

        The checkpoint stays, whatever is to be kept, until training has finalized a newer one.

        Args:
          target: What to load: a tree of arrays or `jax.ShapeDtypeStruct`, which decides structure,
            dtypes and shardings and may lack leaves that the checkpoint has; an NNX module, or a
            tree in which NNX objects stand (`{"params": model, "opt_state": optimizer}`), which
            are updated in place; None for everything, as nested dicts and lists. What it lacks is
            not read: `{"params": params}` loads the parameters only, and so does an NNX module.
          which: "latest", "best" by `monitor` and `mode`, or a step.

        Returns:
          The state and its step; None if there is no checkpoint yet.

        Raises:
          ValueError: `which` is "best" and there is no `monitor`.
          NoSessionError: There is no checkpoint of the step that `which` is.
          TargetMismatchError: The checkpoint does not fit `target`; nothing was updated.
        """
        self.recover()
        while True:
            step = _directory.choose(self.directory, self.retention, which)
            if step is None:
                logger.info("There is no checkpoint in %s to restore.", self.directory)
                return None
            self.finalizer.resumed(self.directory, step)
            try:
                restored = self._load(self.directory / str(step), target)
            except fp.NoSessionError:
                if step in fp.steps(self.directory):
                    raise
                continue  # another process has just removed it
            self._last_saved = step
            return restored, step

    def _load(self, path: Path, target: Any) -> Any:
        if not self.shows_progress:
            return _state.load(path, target)
        bar = Bar("Loading a checkpoint")
        try:
            return _state.load(path, target, progress=bar.update)
        finally:
            bar.close()

    # What the hook calls.

    def is_due(self, trainer: Any, step: int, *, epoch_ends: bool) -> bool:
        """Whether to save `step`, which may end its epoch, and is not saved yet; never step 0."""
        schedule = self._schedule
        is_time = self._clock is not None and self._clock.is_due(step)  # asked about every step
        is_due = (
            is_time
            or schedule.is_step_due(step)
            or (epoch_ends and schedule.is_epoch_due(trainer.current_epoch))
        )
        is_due = is_due or self._is_last(step) or self._is_rescued(step)
        return is_due and step not in (0, self._last_saved)

    def failed(self, error: BaseException) -> None:
        """Counts a checkpoint that will not be; raises its error at the next hook, or logs it."""
        self.failed_saves += 1
        if self._on_save_error == "raise":
            self._failures.append(error)
        else:
            logger.error("A checkpoint failed; training goes on.", exc_info=error)

    @_held
    def _stream(self, trainer: Any, root: str, name: _groups.Name, tree: Any) -> None:
        checkpoint = self._open(trainer, self._step_before_batch(trainer) + 1)
        try:
            leaves = _groups.flatten(_groups.placed(root, name, _state.pure(tree)))
            leaves = _stacked.spread(leaves, self._stacked)
            groups = {_groups.group_name(root, name): leaves}
            for group, layer in _stacked.by_row(groups).items():
                checkpoint.save(self, group, _groups.subtree(layer))
        except Exception as error:  # noqa: BLE001 - a tree that JAX cannot flatten
            checkpoint.fail(error, [self])

    def _save(self, trainer: Any, module: Any, step: int, *, epoch_ends: bool) -> None:
        checkpoint = self._open(trainer, step)
        groups = {}
        try:
            tree = _state.take(trainer, module, self._state_fn)
            groups = self._rest(trainer, tree, checkpoint)
        except Exception as error:  # noqa: BLE001 - state_fn or group_by, or values they cannot take
            checkpoint.fail(error, [self])
        self.finalizer.close(self, checkpoint, groups, trainer=trainer, epoch_ends=epoch_ends)
        self._last_saved = step
        if self._clock is not None:
            self._clock.saved()

    def _open(self, trainer: Any, step: int) -> PendingCheckpoint:
        if not self._has_recovered:
            self.recover()
        return self.finalizer.open(self, step=step, epoch=trainer.current_epoch)

    def _rest(self, trainer: Any, tree: Any, checkpoint: PendingCheckpoint) -> dict[str, Any]:
        """The groups of the state that were not streamed."""
        if tree is None and self._state_fn is None and not checkpoint.names:
            raise TypeError(
                f"Found no state to save in {type(trainer).__name__}: its module is no NNX module, "
                "and its `state` no tree. Pass state_fn=, or stream every layer."
            )
        leaves = _groups.flatten(tree)
        names = {_groups.leaf_name(path) for path, _ in leaves} | checkpoint.names
        _stacked.check_known(self._stacked, names)
        group_by = self._group_by or _groups.layerwise(leaves, self._stacked)
        rest = [
            leaf for leaf in _stacked.spread(leaves, self._stacked) if not checkpoint.holds(*leaf)
        ]
        groups = _stacked.by_row(_groups.cut(rest, group_by))
        return {name: _groups.subtree(group) for name, group in groups.items()}

    def _step_before_batch(self, trainer: Any) -> int:
        if self._step_before is None:
            self._step_before = int(trainer.global_step)
        return self._step_before

    def _reach(self, step: int, hook: str) -> None:
        if self._save_on_preemption:
            self.finalizer.preemption.reach(step, hook)

    def _is_last(self, step: int) -> bool:
        return self._save_on_preemption and self.finalizer.preemption.is_due(step)

    def _stop_after_last(self, trainer: Any, step: int) -> None:
        """Finalizes, and tells training to stop, once all callbacks have saved the last step."""
        preemption = self.finalizer.preemption
        if self._save_on_preemption and preemption.is_last(self.state_key, step):
            self.finalizer.epoch_ended(trainer)
            self.finalizer.wait(show_progress=self.shows_progress)
            preemption.stop(trainer)

    def _is_rescued(self, step: int) -> bool:
        return self._finished is not None and self.finalizer.rescued_step == step

    def _rescue(self, trainer: Any) -> None:
        """Saves the last finished step, and finalizes what is complete; an error is on its way."""
        finished = self._finished
        try:
            if finished is not None and finished.step not in (0, self._last_saved):
                finished.check_is_there()
                self.finalizer.rescued_step = finished.step
                checkpoint = self.finalizer.open(self, step=finished.step, epoch=finished.epoch)
                groups = self._rest(trainer, finished.tree, checkpoint)
                self.finalizer.close(self, checkpoint, groups, trainer=trainer, epoch_ends=False)
                self._last_saved = finished.step
            self.finalizer.epoch_ended(trainer)
        except Exception:
            logger.exception("The last finished step could not be saved.")

    def _end(self) -> None:
        self.finalizer.wait(show_progress=self.shows_progress)
        self.finalizer.part(self)
        self._stop_listening()
        self._finished = None

    def _stop_listening(self) -> None:
        self.finalizer.preemption.unwatch(self.state_key)
        if self._clock is not None:
            self._clock.stop()

    def _tell_costs(self, trainer: Any) -> None:
        """Of each finalized checkpoint once: to the function of each callback, or the trainer."""
        reader = "the trainer" if self._on_metrics is None else self.state_key
        for report in self.finalizer.new_reports(reader):
            send(report, trainer, self._on_metrics)

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures.popleft()
