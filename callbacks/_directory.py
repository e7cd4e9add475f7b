"""A run's directory of steps: what an ended run left in it, which are removed, which is the best.

Of several processes the first one changes the directory; the others wait for it where they read
what it has done.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

import flax_partial as fp
from flax_partial.callbacks._metrics import finite_numbers
from flax_partial.callbacks.policies import SavedStep, ranked
from flax_partial.runs import completeness, liveness
from flax_partial.runs import directory as runs_directory
from flax_partial.runs.directory import checkpoints, probably_meant, step_in_name

if TYPE_CHECKING:
    from collections.abc import Container

    from flax_partial.callbacks._schedule import Retention
    from flax_partial.runs.directory import AnyPath
    from flax_partial.runs.liveness import Life

logger = logging.getLogger(__name__)

_IS_WRITTEN = "another process still saves into it."


def recover(
    directory: AnyPath, life: Life, *, live: Container[AnyPath], begins: bool, timeout_secs: float
) -> str:
    """Finalizes the sessions whose groups are all there, drops all others, and logs which.

    Those of another run that lives are left alone. Under `jax.distributed` all processes call it;
    the first of them does it, the others wait.

    Args:
      directory: A run's directory of steps; it need not exist.
      life: This run's.
      live: Checkpoints that this process is writing: their sessions are kept.
      begins: Whether the run begins to train: then no other one may.
      timeout_secs: For how many seconds to wait for other processes.

    Returns:
      A name for the run that begins here, the same in all processes and never used before.

    Raises:
      CheckpointInUseError: It begins, and another run lives there.
      OSError: The storage failed; calling again goes on where this stopped. Where this process may
        only read, it changes nothing, and logs that instead.
      IncompleteCheckpointError: Some process did not call it in time.
    """
    jax.process_index()  # starts JAX's devices, which involves all processes: so not in `act`
    run: str = fp.agree(
        f"recover {directory.absolute()}",
        ready=lambda: None,
        act=lambda _: _recover(directory, life, live, begins=begins, timeout_secs=timeout_secs),
        timeout_secs=timeout_secs,
    )
    return run


def _recover(
    directory: AnyPath, life: Life, live: Container[AnyPath], *, begins: bool, timeout_secs: float
) -> str:
    if begins:
        runs_directory.make(directory)
        runs_directory.check_is_none(directory)
    if begins or directory.is_dir():
        with liveness.recovering(directory, timeout_secs):
            if begins:
                life.begin()
            other = None if life.has_begun else liveness.living(directory)
            if other is None:
                _settle_all(directory, live, timeout_secs=timeout_secs if begins else 0)
            else:
                logger.info("Left %s as it is: a run trains in it (%s).", directory, other)
    return uuid.uuid4().hex


def _settle_all(directory: AnyPath, live: Container[AnyPath], *, timeout_secs: float) -> None:
    for step, path in runs_directory.unfinished(directory):
        if path in live:
            continue
        if not _is_idle(path, timeout_secs):
            logger.warning("Left the unfinished checkpoint %s as it is: %s", path, _IS_WRITTEN)
            continue
        try:
            _settle(path, step, timeout_secs)
        except OSError as error:
            if not is_read_only(error):
                raise
            logger.warning("Left the unfinished checkpoint %s as it is: %s", path, error)


def _is_idle(path: AnyPath, timeout_secs: float) -> bool:
    """Waits until no process saves into a session any more; returns whether that came in time."""
    session = path.with_name(f"{path.name}.partial_save")
    return liveness.wait_until_idle(session, timeout_secs)


def is_read_only(error: OSError) -> bool:
    """Whether what failed is that this process may only read."""
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def check_is_newer(directory: AnyPath, step: int) -> AnyPath | None:
    """Returns the newest checkpoint, which has to be older than `step`; None if there is none.

    Raises:
      CheckpointExistsError: Some checkpoint is of this step, or a later one.
    """
    path = fp.latest(directory)
    newest = None if path is None else step_in_name(path.name)
    if newest is not None and newest >= step:
        raise _mixed(directory, newest, step)
    return path


def _mixed(directory: AnyPath, newest: int, step: int) -> fp.CheckpointExistsError:
    return fp.CheckpointExistsError(
        f"{directory} holds step {newest} already, and training is only at step {step}: the steps "
        "of two runs would mix. Restore the newest checkpoint; or, to go back to an older one, "
        "restore with discard_later=True, which removes the later ones; or start anew with "
        "overwrite=True, which removes all; or use another directory."
    )


def check_none_later(directory: AnyPath, step: int, path: AnyPath | None = None) -> None:
    """Checks that training may go on from a step, whose checkpoint is at `path`, if that is known.

    Raises:
      CheckpointExistsError: There are later ones; or one of this step that is another.
    """
    in_the_way = _later(directory, step, path)
    if in_the_way:
        raise _mixed(directory, in_the_way[-1], step)


def _later(directory: AnyPath, step: int, path: AnyPath | None) -> list[int]:
    held = checkpoints(directory)
    is_another = path is not None and step in held and not _is_same(held[step], path)
    return [one for one in held if one > step or (one == step and is_another)]


def _is_same(one: AnyPath, other: AnyPath) -> bool:
    if isinstance(other, fp.StorePath):
        return other.samefile(one)
    return one.samefile(other)


def discard(directory: AnyPath, step: int, path: AnyPath | None, *, timeout_secs: float) -> None:
    """Removes what `check_none_later` would refuse.

    The newest goes first: killed meanwhile, what is left is of one run. Under `jax.distributed` all
    processes call it.

    Raises:
      CheckpointInUseError: One of them is being read; those that are older stay, too.
      OSError: One of them cannot be removed.
    """
    fp.agree(
        f"discard {directory}",
        ready=lambda: None,
        act=lambda _: _discard(directory, step, path),
        timeout_secs=timeout_secs,
    )


def _discard(directory: AnyPath, step: int, path: AnyPath | None) -> None:
    held = checkpoints(directory)
    for one in reversed(_later(directory, step, path)):
        fp.remove(held[one])
        logger.warning("Removed %s: training begins at step %d.", held[one], max(step, 0))


def drop_unless_complete(path: AnyPath, step: int, why: str, *, timeout_secs: float) -> None:
    """Drops a session that lacks anything of the checkpoint of `step`, and logs why.

    One that lacks nothing is left for `recover` to finalize: it failed for some other reason.

    Args:
      path: The checkpoint.
      step: Its step.
      why: Why it is not finalized.
      timeout_secs: For how many seconds to wait for other processes that save into it.
    """
    if not _is_primary():
        return
    if not _is_idle(path, timeout_secs):
        logger.warning("Left the unfinished checkpoint %s as it is: %s", path, _IS_WRITTEN)
        return
    try:
        if completeness.missing(fp.status(path), step) is not None:
            _drop(path, why, timeout_secs)
    except fp.NoSessionError:
        return


def _is_primary() -> bool:
    return jax.process_index() == 0


def prune(directory: AnyPath, retention: Retention, *, protected: Container[int] = ()) -> None:
    """Removes the checkpoints that are no longer to be kept, oldest first.

    Each is renamed, then deleted: killed anywhere, a checkpoint is whole or is none, and `sweep`
    deletes the rest of it. One that is being read stays until the next call. What cannot be looked
    into has no score.

    Args:
      directory: A run's directory of steps.
      retention: Which are kept.
      protected: Steps that are kept in any case.
    """
    if not (retention.removes and _is_primary()):
        return
    found = checkpoints(directory)
    known = _looked_into(found) if retention.looks_inside else {}
    saved = [known.get(step, SavedStep(step)) for step in found]
    for step in retention.expired(saved):
        if step not in protected:
            _remove(found[step])


def _remove(path: AnyPath) -> None:
    try:
        fp.remove(path)
    except fp.CheckpointInUseError as error:
        logger.debug("Left %s for now: %s", path, error)
    except fp.NoSessionError:
        return  # another process has removed it
    except OSError:
        logger.exception("Could not remove the checkpoint %s; training goes on.", path)
    else:
        logger.debug("Removed the checkpoint %s.", path)


def sweep(directory: AnyPath) -> None:
    """Deletes what is left of checkpoints and sessions whose removal was interrupted."""
    if _is_primary():
        runs_directory.sweep(directory)


def choose(
    directory: AnyPath, retention: Retention, which: str | int | os.PathLike[str]
) -> tuple[int, AnyPath] | None:
    """Returns the newest step, the best of those with a score, or a given one, and its path.

    None where there is no checkpoint yet.

    Raises:
      ValueError: The best one is asked for, and no metric, or no checkpoint that has it. Or nothing
        tells the step of the path that is asked for.
      NoSessionError: There is no checkpoint of the step, or at the path, that is asked for.
    """
    held = checkpoints(directory)
    if isinstance(which, os.PathLike) or (isinstance(which, str) and os.sep in which):
        return _at_path(which)
    if isinstance(which, int) and not isinstance(which, bool):
        if which not in held:
            raise fp.NoSessionError(
                f"There is no checkpoint of step {which} in {directory}.{probably_meant(directory)}"
            )
        return which, held[which]
    if which == "latest":
        return next(reversed(held.items()), None)
    if which != "best" or retention.monitor is None:
        raise ValueError(
            f"which={which!r} with monitor={retention.monitor!r}: it must be 'latest', a step, a "
            "checkpoint's path, or 'best' where a monitor scores the checkpoints."
        )
    found = best(directory, retention)
    if found is None and held:
        names = sorted({name for one in _looked_into(held).values() for name in one.metrics})
        raise ValueError(
            f"No checkpoint in {directory} has the metric {retention.monitor!r}, by which the best "
            f"is chosen. Metrics that are stored: {', '.join(names) or 'none'}."
        )
    return None if found is None else found[:2]


def _at_path(path: str | os.PathLike[str]) -> tuple[int, AnyPath]:
    described = fp.metadata(path)
    step = completeness.recorded(described).get("step")
    if not isinstance(step, int):
        step = step_in_name(described.path.name)
    if step is None:
        raise ValueError(
            f"which={str(described.path)!r}: nothing there tells of which step it is. Load it with "
            "fp.load."
        )
    return step, described.path


def best(directory: AnyPath, retention: Retention) -> tuple[int, AnyPath, float] | None:
    """Returns the step of the best checkpoint, its path and score; None if none has a score."""
    monitor = retention.monitor
    if monitor is None:
        return None
    held = checkpoints(directory)
    known = _looked_into(held)
    scores = {step: one.metrics[monitor] for step, one in known.items() if monitor in one.metrics}
    return next(((one, held[one], scores[one]) for one in ranked(scores, retention.mode)), None)


def _looked_into(held: Mapping[int, AnyPath]) -> dict[int, SavedStep]:
    found = {}
    for step, path in held.items():
        # Another process may have removed it; and what is damaged has no score.
        with contextlib.suppress(FileNotFoundError, fp.CorruptCheckpointError):
            found[step] = _look_into(path, step, runs_directory.identity(path))
    return found


@functools.lru_cache(maxsize=4096)
def _look_into(path: AnyPath, step: int, _identity: object) -> SavedStep:
    """Reads it once: the table of contents of a large model takes a while."""
    metadata = fp.metadata(path)
    metrics = metadata.custom_metadata.get("metrics")
    ranked_by = completeness.recorded(metadata).get("ranked_by")
    return SavedStep(
        step=step,
        metrics=finite_numbers(metrics) if isinstance(metrics, Mapping) else {},
        ranked_by=ranked_by if isinstance(ranked_by, Mapping) else {},
        finalized_at=metadata.committed_at,
    )


def _settle(path: AnyPath, step: int, timeout_secs: float) -> None:
    lacking = completeness.missing(fp.status(path), step)
    if lacking is not None:
        _drop(
            path,
            f"{lacking}, and its process has ended.{_said_newest(path.parent)}",
            timeout_secs,
        )
        return
    try:
        fp.finalize(path, processes=[jax.process_index()], timeout_secs=0)
    except fp.PartialCheckpointError as error:  # it would be raised again
        _drop(path, f"it cannot be finalized: {error}{_said_newest(path.parent)}", timeout_secs)
    else:
        logger.warning(
            "Finalized %s: step %d was completely written when its process ended, but not "
            "finalized.",
            path,
            step,
        )


def _said_newest(directory: AnyPath) -> str:
    newest = next(reversed(checkpoints(directory).values()), None)
    if newest is None:
        return f" There is no checkpoint in {directory} yet."
    return f" The newest checkpoint is {newest}."


def _drop(path: AnyPath, why: str, timeout_secs: float) -> None:
    try:
        fp.abort(path, timeout_secs=timeout_secs)
    except (fp.CheckpointExistsError, fp.CheckpointInUseError) as error:
        # It has files that are not of a session; or a save into it has begun.
        logger.warning("Left the unfinished checkpoint %s as it is: %s", path, error)
    else:
        logger.warning("Dropped the unfinished checkpoint %s: %s", path, why)
