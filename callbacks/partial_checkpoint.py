"""Saves each layer of a training step the moment it is ready, as one checkpoint: the callback.

What a user gives and calls is here; what a trainer calls is in `_hooks.py`.
"""

from __future__ import annotations

import contextlib
import logging
import reprlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import flax_partial as fp
from flax_partial.callbacks import _state
from flax_partial.callbacks._clock import Clock
from flax_partial.callbacks._groups import Grouping
from flax_partial.callbacks._hooks import TrainingHooks
from flax_partial.callbacks._leaves import flatten, unrestored
from flax_partial.callbacks._member import Failures, Member
from flax_partial.callbacks._preemption import check_signals
from flax_partial.callbacks._restored import progress_of
from flax_partial.callbacks._saver import StepSaver
from flax_partial.callbacks._schedule import Retention, Schedule
from flax_partial.callbacks._stateful import Extras
from flax_partial.callbacks._tiers import best, choose, tiers_of
from flax_partial.callbacks.finalize_hook import FinalizeHook
from flax_partial.callbacks.progress import Bar
from flax_partial.runs import completeness
from flax_partial.runs.directory import checked, probably_meant

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from collections.abc import Set as AbstractSet
    from datetime import timedelta

    from flax_partial.callbacks._groups import GroupBy
    from flax_partial.callbacks._metrics import OnMetrics
    from flax_partial.callbacks._reports import CheckpointReport
    from flax_partial.callbacks._stacked import Stacked
    from flax_partial.callbacks.policies import Policy
    from flax_partial.runs.directory import AnyPath

logger = logging.getLogger(__name__)

_STEP_LEAF = "checkpoint_step"  # that earlier versions added to the tree, for themselves


class PartialCheckpointCallback(TrainingHooks):
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
      directory: The run's directory; absolute.
      finalizer: The hook that finalizes.
      restored: How far training was at the checkpoint that was restored last; None before.
      is_idle: Whether a trainer that only validates, tests or predicts, or only tries whether all
        runs (Lightning's `fast_dev_run`), has called `setup`: then no hook does anything.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_n_epochs: int | None = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        group_by: GroupBy | None = None,
        stacked: Stacked | None = None,
        state_fn: _state.StateFn | None = None,
        keep: Policy | Iterable[Policy] | None = None,
        extras: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        save_initial: bool = False,
        overwrite: bool = False,
        keep_last: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max", "auto"] = "min",
        save_top_k: int | None = None,
        keep_every_n_steps: int | None = None,
        keep_time_interval: timedelta | None = None,
        save_on_preemption: bool = True,
        preemption_signals: Iterable[int] = (signal.SIGTERM,),
        save_on_exception: bool = False,
        finalizer: FinalizeHook | None = None,
        options: fp.SaveOptions | None = None,
        reuse_unchanged: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        when_behind: Literal["wait", "skip"] = "wait",
        on_metrics: OnMetrics | None = None,
        progress: bool = False,
        local: str | os.PathLike[str] | None = None,
        local_keep_last: int = 1,
        most_uploads: int = 2,
    ) -> None:
        """Prepares a callback; nothing is written before training begins.

        Args:
          directory: A run's directory, which holds a checkpoint a step; `~` is the home directory.
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
          extras: From a name to an object with a state of its own, which is saved beside the arrays
            and set by `restore`: an iterator of data with `get_state` and `set_state` (Grain's) or
            `state_dict` and `load_state_dict`, `random` or `random.Random`, a NumPy generator, what
            has `to_json` and `from_json`; or a pair of functions, one that returns a state and one
            that takes it. Each process keeps its own.
          custom_metadata: JSON values that are stored with each checkpoint, as of `fp.save`, such
            as the commit of your code; and with those of `trainer.custom_metadata`, if there is
            one, which are of the step. `fp.metadata(path).custom_metadata` has them.
          save_initial: Save the state that training begins with, too, as step 0, unless it was
            restored.
          overwrite: Start anew: the checkpoints that the directory holds of later steps than
            training begins at, which are all where it begins at 0, are removed then.
          keep: Policies that say which checkpoints to keep (`flax_partial.callbacks.policies`), one
            or several. Without this and the other four that say what to keep, all are kept; with
            any of them, the newest and what any one keeps.
          keep_last: Keep so many of the newest checkpoints.
          monitor: The one of the trainer's `callback_metrics` that scores a checkpoint. Only what
            was set in a checkpoint's own step, or by a validation after it, is its score: a
            checkpoint that lacks it waits for that until the next step begins. By default, that of
            the first `BestN` of `keep`.
          mode: Whether the best score is the smallest or the largest; "auto" goes by the words of
            its name ("loss", "accuracy"), and refuses any other.
          save_top_k: Keep so many of the best checkpoints, and the newest 5 whose score is not
            known (`BestN` of `keep` takes another number). -1: all are kept, whatever else is said.
          keep_every_n_steps: Keep the first checkpoint at or after each n-th step, and step 0.
          keep_time_interval: Keep the oldest checkpoint, and after it always the first that is
            finalized so much later than the one kept before.
          save_on_preemption: When the process gets SIGTERM, save the step under way once it is
            finished, finalize, and stop: by `trainer.should_stop = True`, or, where the trainer has
            no such attribute, `SystemExit(143)`. A handler that was there before is called then,
            in place of that exit. Listens from `on_fit_start` to the end of training.
          preemption_signals: Which signals say that, such as `(SIGTERM, SIGUSR1)` where SLURM is
            told to send one (`--signal=USR1@300`). Of another one the exit status is 128 and its
            number, too.
          save_on_exception: When training fails, save the last step that was finished. Its arrays
            are kept until the next one is; if some were donated to the step under way, it cannot
            be saved, and that is logged.
          finalizer: Shared by all callbacks that save into one directory; by default, one of its
            own.
          options: How parts are written.
          reuse_unchanged: Whether leaves that are to the byte what they were in the checkpoint
            before (frozen layers, the base of an adapter) are not written again: both checkpoints
            share the files that hold them, and either may be removed.
          on_save_error: Whether a failed save is raised at the next hook, or logged and counted. A
            `DeviceMemoryError` is logged in any case; the last step of a run is then saved again.
          when_behind: What becomes of a step that is due by `every_n_train_steps` or
            `train_time_interval` while the checkpoint before is still being written. Training waits
            for that ("wait"), or the step is not saved ("skip"), which is logged and counted in
            `skipped_saves`. Where a step was skipped, the epoch's last one, or the run's, is saved
            in its place. All callbacks of a directory have to skip for one to do so.
          on_metrics: Called in a hook, once a checkpoint is finalized, with its step and, before
            that, `checkpoint/blocked_secs`, `.../write_secs`, `.../bytes`, `.../finalize_secs`; by
            default, `log_metrics` of the trainer's `loggers` or `logger`, if it has any. What it
            raises is raised by that hook, and harms no checkpoint.
          progress: Show a bar of bytes while training waits for checkpoints, or for one to be
            loaded, for longer than a second; none while a display of rich is running.
          local: A directory on a fast disk, the local tier: checkpoints are saved there, and
            uploaded to `directory` in the background. What is to be kept is said of `directory`. Of
            several processes, all have to see it.
          local_keep_last: How many of the newest checkpoints stay in the local tier once they are
            uploaded.
          most_uploads: How many checkpoints may wait to be uploaded, or be under way. Past it the
            run is behind, and `when_behind` says what becomes of the next.

        Raises:
          ValueError: An option has a value that makes no sense, alone or with another; or
            `directory` is a URL that nothing serves, or lies in a checkpoint.
          TypeError: `stacked` maps something else than names to numbers, or tuples of them; one of
            `extras` has no state that can be got and set; or what is to be called cannot be.
        """
        _check_kind(Callable, group_by=group_by, state_fn=state_fn, on_metrics=on_metrics)
        _check_kind(str, monitor=monitor)
        _check_kind(fp.SaveOptions, options=options)
        _check_kind(FinalizeHook, finalizer=finalizer)
        _check_kind(Mapping, stacked=stacked, extras=extras)
        failures = Failures(on_save_error)
        if when_behind not in ("wait", "skip"):
            raise ValueError(f"when_behind is {when_behind!r}; it must be 'wait' or 'skip'.")
        self.directory = checked(directory)
        self.finalizer = finalizer or FinalizeHook()
        self._run = self.finalizer.runs.of(
            *tiers_of(self.directory, local, keep_last=local_keep_last, most_behind=most_uploads)
        )
        options = options or fp.SaveOptions()
        if options.share_replicas is None:
            options = replace(options, share_replicas=True)
        grouping = Grouping(group_by, stacked or {}, share_replicas=bool(options.share_replicas))
        self._extras = Extras(extras or {})
        self._on_metrics = on_metrics
        self._save_on_exception = save_on_exception
        self._overwrite = overwrite
        where = str(self.directory)
        options_of_key = f"{every_n_epochs=}, {every_n_train_steps=}, {monitor=}"
        key = f"{type(self).__qualname__}({where!r}, {options_of_key})"
        self._member = Member(
            key=self.finalizer.runs.unique_key(key),
            schedule=Schedule(every_n_epochs, every_n_train_steps, train_time_interval),
            clock=None if train_time_interval is None else Clock(train_time_interval),
            retention=Retention.of(
                keep=keep,
                keep_last=keep_last,
                monitor=monitor,
                mode=mode,
                save_top_k=save_top_k,
                keep_every_n_steps=keep_every_n_steps,
                keep_time_interval=keep_time_interval,
            ),
            options=options,
            reuse_unchanged=reuse_unchanged,
            saves_initial=save_initial,
            shows_progress=progress,
            signals=check_signals(preemption_signals if save_on_preemption else ()),
            skips_when_behind=when_behind == "skip",
            failures=failures,
        )
        self._saver = StepSaver(
            self._run,
            self._member,
            grouping,
            self._extras,
            state_fn=state_fn,
            custom_metadata=_checked(custom_metadata),
        )

    @property
    def failed_saves(self) -> int:
        """Number of checkpoints that were given up."""
        return self._member.failures.count

    @property
    def skipped_saves(self) -> int:
        """Number of steps that were due and not saved, since the one before was on its way."""
        return self._member.skipped

    @property
    def monitors(self) -> AbstractSet[str]:
        """The metrics that rank its checkpoints."""
        return self._member.retention.modes.keys()

    @property
    def reports(self) -> tuple[CheckpointReport, ...]:
        """What each checkpoint of its hook holds and cost."""
        return self.finalizer.reports

    @property
    def last_model_path(self) -> str:
        """The newest finalized checkpoint of the directory; "" while there is none."""
        found = choose(self._run.places, self._member.retention, "latest")
        return str(found[1]) if found else ""

    @property
    def best_model_path(self) -> str:
        """The best checkpoint that is there, by `monitor`; without one, the newest; "" if none.

        Like `last_model_path` it is looked up on disk: after a restart it is the same.
        """
        if self._member.retention.monitor is None:
            return self.last_model_path
        found = best(self._run.places, self._member.retention)
        return str(found[1]) if found else ""

    @property
    def best_model_score(self) -> float | None:
        """The score that `best_model_path` was stored with; None without a score or a `monitor`."""
        found = best(self._run.places, self._member.retention)
        return found[2] if found else None

    def save_now(self, trainer: Any, module: Any = None) -> AnyPath:
        """Saves the newest finished step, due or not, and waits until it is finalized.

        Between two steps, or before the first, which is step 0 then.

        Args:
          trainer: The trainer.
          module: What its hooks are given.

        Returns:
          The checkpoint's path.

        Raises:
          CheckpointExistsError: The directory holds this step, or a later one, of another run.
          Exception: What failed: in this save, or before where errors are not logged alone. Called
            again, it saves anew, unless other processes or callbacks save the step as well.
        """
        with self._blocked("save_now", trainer):
            step = trainer.global_step
            if step != self._member.last_saved:
                self._member.failures.logged = None
                self._saver.save(trainer, module, epoch_ends=False)
            self._finish(trainer, module)
            self._run.raise_logged(self._member, step)
        return self.directory / str(step)

    def recover(self) -> None:
        """Finalizes or drops what an ended run has left unfinished, as `on_fit_start` does."""
        self._run.recover()

    @property
    def epoch_began(self) -> int:
        """Steps done when the epoch under way began."""
        return self._saver.epoch_began

    def restore(
        self,
        target: Any = None,
        module: Any = None,
        *,
        which: str | int | os.PathLike[str] = "latest",
        partial: bool = False,
        keep_missing: bool = False,
        cast: bool = False,
        discard_later: bool = False,
        restack: Mapping[fp.Stack | str, fp.Stack | str] | None = None,
        renames: Mapping[str, str] | None = None,
    ) -> tuple[Any, int] | None:
        """Loads the newest or best checkpoint, or that of a step; recovers first.

        The checkpoint stays, whatever is to be kept, until training has finalized a newer one. Once
        training has begun (after `on_fit_start`), an older step than the newest is refused, unless
        `discard_later`: what is trained from there would mix with the later ones. Before, it may be
        looked at; training that then begins there is refused in `on_fit_start`.

        Args:
          target: What to load: a trainer, for all that this callback saves of it; a tree of arrays
            or `jax.ShapeDtypeStruct`, which decides structure, dtypes and shardings; an NNX module,
            which is its "params", or a tree in which NNX objects stand (`{"params": model,
            "opt_state": optimizer}`); None for everything, as nested dicts and lists. NNX objects
            are updated in place. A trainer's `state`, `global_step` and `current_epoch` are set.
          module: Where the target is a trainer, what its hooks are given.
          which: "latest", "best" by `monitor` and `mode`, a step, or the path of a checkpoint,
            wherever it lies.
          partial: Whether `target`, or this callback's `extras`, may lack what the checkpoint has;
            that is not read, and logged.
          keep_missing: Whether the checkpoint may lack leaves of `target`, or `extras`; those stay
            as they are.
          cast: Whether a dtype that differs is converted; an error otherwise.
          discard_later: Whether later checkpoints are removed, once this one is loaded: each time
            that this is called.
          restack: How the checkpoint stacks layers, to how the target does; as for `fp.load`.
          renames: Names in the checkpoint, to those in the target; as for `fp.load`.

        Returns:
          The state and its step; None if there is no checkpoint yet.

        Raises:
          ValueError: `which` is "best", and there is no `monitor`, or no checkpoint that has it.
          NoSessionError: There is no checkpoint of the step, or at the path, that `which` is.
          TargetMismatchError: It does not fit `target`, or `extras`; nothing was updated.
          CheckpointExistsError: Training would go on from an older step than the newest.
          CheckpointInUseError: A later one that is to be discarded is being read, or another run
            trains in the directory.
        """
        options = _state.LoadOptions(
            partial=partial,
            keep_missing=keep_missing,
            cast=cast,
            restack=restack,
            renames=renames,
        )
        tree = self._saver.find(target, module) if _state.is_trainer(target) else target
        self.recover()
        while found := choose(self._run.places, self._member.retention, which):
            try:
                state, step = self._restore(*found, tree, options, discard_later=discard_later)
            except fp.NoSessionError:
                if which not in ("latest", "best") or found[1].exists():
                    raise
                # another process has just removed it
            else:
                if tree is not target and self.restored is not None:
                    epochs_done = self.restored.epochs_done
                    _state.put_back(target, tree, state, step=step, epochs_done=epochs_done)
                return state, step
        logger.info(
            "There is no checkpoint in %s to restore.%s",
            self.directory,
            probably_meant(self.directory),
        )
        return None

    def _restore(
        self,
        step: int,
        path: AnyPath,
        target: Any,
        options: _state.LoadOptions,
        *,
        discard_later: bool,
    ) -> tuple[Any, int]:
        if self._is_training and not discard_later:
            self._run.check_none_later(step, path)
        described = fp.metadata(path)
        recorded = completeness.recorded(described)
        progress = progress_of(recorded, step)
        extras = self._extras.find(
            recorded,
            partial=options["partial"] or target is None,
            keep_missing=options["keep_missing"],
        )
        if _STEP_LEAF in described.leaves:
            options = {**options, "partial": True}
        self._run.go_on(step)
        state = self._load(path, target, options)
        self._extras.set(extras)
        if discard_later:
            self._run.discard_later(step, path)
        self._member.last_saved = step
        self._saver.epoch_began = step - progress.steps_of_epoch
        self.restored = progress
        logger.info("Restored step %d from %s.", step, path)
        if target is not None:
            self._tell_of_the_rest(described, target, options)
        return state, step

    def _tell_of_the_rest(
        self, described: fp.CheckpointMetadata, target: Any, options: _state.LoadOptions
    ) -> None:
        """Logs what of a checkpoint was not restored; with other names that is not looked for."""
        if options["partial"] and not (options["renames"] or options["restack"]):
            names = (name for name in described.leaves if name != _STEP_LEAF)
            if rest := unrestored(names, flatten(_state.pure(_state.rooted(target)))):
                level = logging.WARNING if self._is_training else logging.INFO
                logger.log(level, "Not restored of %s: %s.", described.path, rest)

    def _load(self, path: AnyPath, target: Any, options: _state.LoadOptions) -> Any:
        if not self._member.shows_progress:
            return _state.load(path, target, options)
        with contextlib.closing(Bar("Loading a checkpoint")) as bar:
            return _state.load(path, target, options, progress=bar.update)


def _checked(custom_metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns a copy of a run's metadata; whether a value can be stored is checked by the save."""
    metadata = dict(custom_metadata or {})
    if "metrics" in metadata:
        raise ValueError(
            "custom_metadata has 'metrics': that is where the metrics of each step are stored."
        )
    return metadata


def _check_kind(kind: Any, **options: object) -> None:
    """Raises TypeError for an option that is neither None nor of a kind."""
    for name, one in options.items():
        if one is not None and not isinstance(one, kind):
            raise TypeError(
                f"{name} is {reprlib.repr(one)}; it must be a {kind.__name__}, or None."
            )
