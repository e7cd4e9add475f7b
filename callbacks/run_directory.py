"""A run's directory of steps: what an ended run left in it, which checkpoints go, which is best."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import flax_partial as fp
from flax_partial.callbacks import completeness

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from pathlib import Path

    from flax_partial.callbacks.schedule import Retention

logger = logging.getLogger(__name__)

_SESSION = re.compile(r"(\d+)\.partial_save")
_REMOVED = re.compile(r"\.removed-\d+\.partial_save")


def recover(directory: Path, *, live: Container[Path] = ()) -> None:
    """Finalizes the sessions whose groups are all there, drops all others, and says which.

    Args:
      directory: A run's directory of steps; it need not exist.
      live: Checkpoints that this process is writing: they are left alone.

    Raises:
      OSError: The storage failed; calling again goes on where this stopped.
    """
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    for entry in entries:
        session = _SESSION.fullmatch(entry.name)
        if session and directory / session[1] not in live:
            _settle(directory / session[1], int(session[1]))
        elif _REMOVED.fullmatch(entry.name):
            fp.abort(entry)


def drop_unless_complete(path: Path, step: int, why: str) -> None:
    """Drops a session that lacks anything of the checkpoint of `step`, and says why.

    One that lacks nothing is left for `recover` to finalize: it failed for some other reason.
    """
    try:
        if completeness.missing(fp.status(path), step) is not None:
            _drop(path, why)
    except fp.NoSessionError:
        return


def prune(directory: Path, retention: Retention) -> None:
    """Removes the checkpoints that are no longer to be kept, oldest first.

    Each goes by one rename, to a name that no reader takes for a step and that turns it back into
    a session, which is then dropped: killed anywhere, a checkpoint is whole or none any more, and
    `recover` removes the rest of it.
    """
    steps = fp.steps(directory)
    known = scores(directory, steps, retention.monitor) if retention.save_top_k else {}
    for step in retention.expired(steps, known):
        gone = directory / f".removed-{step}.partial_save"
        (directory / str(step)).rename(gone)
        fp.abort(gone)
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
        fp.finalize(path)
    except fp.PartialCheckpointError as error:  # calling again would not mend it
        _drop(path, f"it was left by an ended run, and cannot be finalized: {error}")
    else:
        logger.warning("Finalized %s, which an ended run had saved but not finalized.", path)


def _drop(path: Path, why: str) -> None:
    fp.abort(path)
    logger.warning("Dropped the unfinished checkpoint %s: %s", path, why)
