"""A run's directory of steps: what an ended run left in it, which checkpoints go, which is best.

Of several processes one changes the directory, the first; the others wait where they have to see
what it has done.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import flax_partial as fp
from flax_partial.callbacks import completeness

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from flax_partial.callbacks.schedule import Retention

logger = logging.getLogger(__name__)

_SESSION = re.compile(r"(\d+)\.partial_save")
_REMOVED = ".removed-{}"
# What `prune` leaves when it is killed, and what `abort` does.
_HALF_DELETED = re.compile(r"\.removed-\d+|\.\d+\.partial_save\.[0-9a-f]+\.deleted")


def recover(directory: Path, *, live: Container[Path] = ()) -> str:
    """Finalizes the sessions whose groups are all there, drops all others, and says which.

    Under `jax.distributed` all processes call it; the first of them does it, and all wait for that.

    Args:
      directory: A run's directory of steps; it need not exist.
      live: Checkpoints that this process is writing: they are left alone.

    Returns:
      A name for the run that begins here, the same in all processes and never used before.

    Raises:
      OSError: The storage failed; calling again goes on where this stopped.
      IncompleteCheckpointError: Some process did not call it in time.
    """
    jax.process_index()  # starts JAX's devices, which involves all processes: so not in `act`
    run: str = fp.agree(
        f"recover {directory.absolute()}",
        ready=lambda: None,
        act=lambda _: _recover(directory, live),
    )
    return run


def _recover(directory: Path, live: Container[Path]) -> str:
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    for entry in entries:
        session = _SESSION.fullmatch(entry.name)
        if session and directory / session[1] not in live:
            _settle(directory / session[1], int(session[1]))
        elif _HALF_DELETED.fullmatch(entry.name):
            _delete(entry)
    return uuid.uuid4().hex


def check_is_newer(directory: Path, step: int) -> Path | None:
    """Refuses a step that is not newer than all checkpoints in the directory.

    Returns:
      The newest of these; None if there is none.

    Raises:
      CheckpointExistsError: Some checkpoint is of this step, or a later one.
    """
    newest = max(fp.steps(directory), default=-1)
    if newest < 0:
        return None
    if newest >= step:
        raise fp.CheckpointExistsError(
            f"{directory} holds step {newest} already, and training is only at step {step}: the "
            "steps of two runs would mix. Restore the newest checkpoint, or use another directory."
        )
    return directory / str(newest)


def drop_unless_complete(path: Path, step: int, why: str) -> None:
    """Drops a session that lacks anything of the checkpoint of `step`, and says why.

    One that lacks nothing is left for `recover` to finalize: it failed for some other reason.
    """
    if not is_primary():
        return
    try:
        if completeness.missing(fp.status(path), step) is not None:
            _drop(path, why)
    except fp.NoSessionError:
        return


def is_primary() -> bool:
    """Whether this is the process, of several, that changes the directory."""
    return jax.process_index() == 0


def prune(directory: Path, retention: Retention) -> None:
    """Removes the checkpoints that are no longer to be kept, oldest first.

    Each goes by one rename, to a name that no reader takes for a step, and is deleted then: killed
    anywhere, a checkpoint is whole or none any more, and `recover` deletes the rest of it.
    """
    if not (retention.removes and is_primary()):
        return
    steps = fp.steps(directory)
    known = scores(directory, steps, retention.monitor) if retention.save_top_k else {}
    for step in retention.expired(steps, known):
        gone = (directory / str(step)).rename(directory / _REMOVED.format(step))
        _sync(directory)
        _delete(gone)
        logger.info("Removed the checkpoint %s.", directory / str(step))


def choose(directory: Path, retention: Retention, which: str) -> int | None:
    """The newest step, or the best one of those that have a score; None if there is none.

    Raises:
      ValueError: The best one is asked for, and there is no metric to choose by.
    """
    steps = fp.steps(directory)
    if which == "latest":
        return max(steps, default=None)
    if which != "best" or retention.monitor is None:
        raise ValueError(
            f"which={which!r} with monitor={retention.monitor!r}: it must be 'latest', or 'best' "
            "where a monitor scores the checkpoints."
        )
    known = scores(directory, steps, retention.monitor)
    return next(iter(retention.ranked(known, known)), None)


def scores(directory: Path, steps: Iterable[int], monitor: str | None) -> dict[int, float]:
    """Step to the score that its checkpoint was stored with; those without one are left out."""
    found = {}
    for step in steps:
        metrics = fp.metadata(directory / str(step)).custom_metadata.get("metrics", {})
        if monitor in metrics:
            found[step] = float(metrics[monitor])
    return found


def _settle(path: Path, step: int) -> None:
    lacking = completeness.missing(fp.status(path), step)
    if lacking is not None:
        _drop(path, f"it was left by an ended run, and {lacking}.")
        return
    try:
        fp.finalize(path, processes=[jax.process_index()])
    except fp.PartialCheckpointError as error:  # calling again would not mend it
        _drop(path, f"it was left by an ended run, and cannot be finalized: {error}")
    else:
        logger.warning("Finalized %s, which an ended run had saved but not finalized.", path)


def _drop(path: Path, why: str) -> None:
    try:
        fp.abort(path)
    except fp.CheckpointExistsError as error:  # somebody's own files lie in it
        logger.warning("Left the unfinished checkpoint %s as it is: %s", path, error)
    else:
        logger.warning("Dropped the unfinished checkpoint %s: %s", path, why)


def _delete(directory: Path) -> None:
    for parent, folders, files in os.walk(directory, topdown=False):
        for name in files:
            Path(parent, name).unlink()
        for name in folders:
            folder = Path(parent, name)
            folder.unlink() if folder.is_symlink() else folder.rmdir()
    directory.rmdir()


def _sync(directory: Path) -> None:
    """Makes a rename durable before what depends on it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
