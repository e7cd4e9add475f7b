"""A run in two tiers: checkpoints are saved on a local disk, and uploaded from there.

A checkpoint counts as soon as it is finalized locally. Then it is copied to the run's directory,
one after the other, in the order of their steps, where it appears whole or not at all. Killed
anywhere, the next run on the machine goes on with the copies; one on another machine goes on from
what the directory holds. Of several processes the first one uploads, and the tier has to be a
directory that all of them see.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import jax

import flax_partial as fp
from flax_partial.callbacks import _directory
from flax_partial.callbacks._background import Worker
from flax_partial.callbacks.policies import ranked
from flax_partial.runs import completeness, takeover
from flax_partial.runs.directory import checked, checkpoints, unfinished

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from flax_partial.callbacks._schedule import Retention
    from flax_partial.runs.directory import AnyPath

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 1.0, 60.0
_LAST_ATTEMPTS = 3  # at an upload that fails once training has ended


def tiers_of(
    directory: AnyPath,
    local: str | os.PathLike[str] | None,
    *,
    keep_last: int,
    most_behind: int,
) -> tuple[AnyPath, Tiers | None]:
    """Returns where a run saves, and the uploads from there if that is a local tier.

    Raises:
      ValueError: An option makes no sense.
    """
    for name, value in (("local_keep_last", keep_last), ("most_uploads", most_behind)):
        if value < 1:
            raise ValueError(f"{name} is a number of checkpoints, 1 or more, not {value!r}")
    if local is None:
        return directory, None
    place = checked(local)
    if isinstance(place, fp.StorePath):
        raise ValueError(f"local is a directory on a disk of this machine, not {place}")  # noqa: TRY004
    around = (directory, *directory.parents)
    if place in around or directory in place.parents:
        raise ValueError(f"local={str(place)!r} has to lie apart from the run's {directory}")
    return place, Tiers(place, directory, keep_last=keep_last, most_behind=most_behind)


def choose(
    places: Iterable[AnyPath], retention: Retention, which: str | int | os.PathLike[str]
) -> tuple[int, AnyPath] | None:
    """Returns the step and the path of a checkpoint in one of several places.

    Of a step that more than one place has it is that of the first; see `_directory.choose`.
    """
    held = [place for place in places if checkpoints(place)] or [*places]
    if isinstance(which, int) and not isinstance(which, bool):
        held = [place for place in held if which in checkpoints(place)] or held
    if which == "best" and (first := best(held, retention)) is not None:
        return first[:2]
    found = [one for place in held if (one := _directory.choose(place, retention, which))]
    return max(found, key=lambda one: one[0], default=None)


def best(places: Iterable[AnyPath], retention: Retention) -> tuple[int, AnyPath, float] | None:
    """Returns the step, the path and the score of the best checkpoint in several places."""
    found = [one for place in places if (one := _directory.best(place, retention))]
    scores = {step: score for step, _, score in found}
    first = next(iter(ranked(scores, retention.mode)), None)
    return next((one for one in found if one[0] == first), None)


class _TakenOverError(Exception):
    """A run with another tier has begun in the directory."""


class Tiers:
    """The local tier of a run, and the uploads from it.

    Attributes:
      local: The directory of the local tier.
      remote: The run's directory.
    """

    def __init__(self, local: Path, remote: AnyPath, *, keep_last: int, most_behind: int) -> None:
        """Prepares it; nothing is written.

        Args:
          local: The directory of the local tier.
          remote: The run's directory.
          keep_last: How many of the newest checkpoints stay in the local tier once they are
            uploaded.
          most_behind: How many checkpoints may wait for their uploads, or be uploaded, before
            another one is saved.
        """
        self.local = local
        self.remote = remote
        self._keep_last = keep_last
        self._most_behind = most_behind
        self._uploads = takeover.Uploads(remote)
        self._worker = Worker("flax_partial_upload")
        self._changed = threading.Condition()  # guards all below
        self._published = -1  # the last step in `remote` when it began
        self._number = 0  # by which `_uploads` finds this run; 0 until it has begun
        self._waiting: list[int] = []  # steps that are to be uploaded, the first one is under way
        self._is_taken_over = False
        self._is_ending = False

    # Before training.

    def check_is_shared(self, *, begins: bool, timeout_secs: float) -> None:
        """Checks that all processes, which call it, see one local tier.

        Args:
          begins: Whether training begins: then the first process makes what is not there yet.
          timeout_secs: For how many seconds to wait for other processes.

        Raises:
          ValueError: They do not; it is raised in all of them.
        """
        if jax.process_count() == 1:
            return
        identity: str = fp.agree(
            f"local tier {self.remote}",
            ready=lambda: None,
            act=lambda _: self._identify() if begins else takeover.identity(self.local),
            timeout_secs=timeout_secs,
        )
        others: list[int] = fp.agree(
            f"all see the local tier {self.remote}",
            ready=lambda: takeover.identity(self.local),
            act=lambda found: [process for process, one in found.items() if one != identity],
            timeout_secs=timeout_secs,
        )
        if others:
            raise ValueError(
                f"local={str(self.local)!r} is another directory in the processes {others} than in "
                "the first one. All processes of a job have to see one local tier, as those of one "
                "machine do; over several machines, save to the run's directory without local."
            )

    def _identify(self) -> str:
        self.local.mkdir(parents=True, exist_ok=True)
        return takeover.identify(self.local, self.remote)

    def reconcile(self, *, begins: bool) -> None:
        """Identifies checkpoints that belong together; of several processes, in the first one.

        What was uploaded whole is published: this run goes on from it, whichever tier it is of.
        Where another tier has taken the run over since this one uploaded last, what is only in this
        one is of a run that was given up: it is set aside. Where training begins, this tier takes
        the run over, drops what others had not uploaded whole, and goes on with its own uploads.

        Raises:
          CheckpointExistsError: The local tier is that of another run's directory.
          OSError: The storage failed.
        """
        if not begins:
            self._publish_whole()
            if not self.local.is_dir():
                return
        mine, last = self._identify(), self._uploads.tier()
        if last not in ("", mine):
            self._set_aside(mine)
            mine = takeover.renew(self.local, self.remote)
        if begins:
            self._begin(mine)

    def _publish_whole(self) -> None:
        """Publishes what was uploaded whole, or is being published; drops nothing."""
        for step, path in unfinished(self.remote):
            try:
                if completeness.missing(fp.status(path), step) is None:
                    _publish(path)
            except (fp.NoSessionError, fp.CheckpointExistsError):
                logger.debug("%s was published, or dropped, just now.", path)
            except OSError as error:
                if not _directory.is_read_only(error):
                    raise
                logger.warning("Left %s, which was uploaded, as it is: %s", path, error)

    def _set_aside(self, mine: str) -> None:
        held = checkpoints(self.local)
        if held:
            aside = self.local / f"taken_over.{mine[:8]}"
            aside.mkdir(exist_ok=True)
            for path in held.values():
                (self.local / path.name).rename(aside / path.name)
            logger.warning(
                "%s was taken over by a run with another local tier: steps %s of this one, %s, are "
                "set aside in %s.",
                self.remote,
                ", ".join(map(str, held)),
                self.local,
                aside,
            )

    def _begin(self, tier: str) -> None:
        self._worker.finish()  # with what a run of this process may have left
        with self._changed:
            self._number = self._uploads.take_over(tier)
            self._waiting.clear()
            self._is_taken_over = self._is_ending = False
        held = checkpoints(self.local)
        newest = max(checkpoints(self.remote), default=-1)
        for step, path in unfinished(self.remote):
            if step <= newest or step not in held:
                _settle(path, step)
        self._published = max(checkpoints(self.remote), default=-1)
        left = [step for step in held if step > self._published]
        for step in left:
            logger.info("Goes on with the upload of %s.", self.local / str(step))
            self.add(step, ())

    def discarded(self, step: int) -> None:
        """Notes that the checkpoints after a step were removed from both tiers."""
        self._published = min(self._published, step)

    # While training.

    def add(self, step: int, retentions: Iterable[Retention]) -> None:
        """Uploads the checkpoint of a step after those before it.

        Args:
          step: The step; its checkpoint is finalized in the local tier.
          retentions: What is then to be kept of those that are uploaded.
        """
        if jax.process_index():
            return
        with self._changed:
            self._waiting.append(step)
        self._worker.submit(functools.partial(self._upload, step, tuple(retentions)))

    @property
    def is_full(self) -> bool:
        """Whether as many checkpoints as may wait for their uploads do."""
        return len(self._waiting) >= self._most_behind and not self._is_taken_over

    def wait_for_room(self, step: int) -> None:
        """Waits until the checkpoint of a step may be saved.

        Raises:
          CheckpointExistsError: The run's directory holds that step, or a later one.
          CheckpointInUseError: Another tier has taken over the run.
        """
        if step <= self._published:
            raise fp.CheckpointExistsError(
                f"{self.remote} holds step {self._published} already, and training is only at step "
                f"{step}: restore the newest checkpoint, or use another directory."
            )
        with self._changed:
            self._changed.wait_for(lambda: not self.is_full)
        if self._is_taken_over:
            raise fp.CheckpointInUseError(
                f"A run with another local tier has taken over {self.remote}: what is saved here "
                "would mix with what that one saves."
            )

    def wait(self) -> None:
        """Waits until all is uploaded; an upload that fails now is tried three times."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._worker.finish()
        with self._changed:
            self._is_ending = False  # a hook may wait while training goes on

    def _upload(self, step: int, retentions: Iterable[Retention]) -> None:
        try:
            if self._upload_in_time(step):
                for retention in retentions:
                    _directory.prune(self.remote, retention)
                self._prune()
        finally:
            with self._changed:
                self._waiting.remove(step)
                self._changed.notify_all()

    def _upload_in_time(self, step: int) -> bool:
        """Uploads a checkpoint, as often as it takes; returns whether it is up."""
        attempts, pause = 0, _FIRST_PAUSE_SECS
        while not self._is_taken_over:
            try:
                self._copy(step)
            except _TakenOverError:
                self._is_taken_over = True
                logger.error(  # noqa: TRY400 - the message says it all
                    "A run with another local tier has taken over %s: steps from %d on stay in %s.",
                    self.remote,
                    step,
                    self.local,
                )
            except (OSError, fp.CorruptCheckpointError) as error:
                attempts = attempts + 1 if self._is_ending else 0
                if isinstance(error, fp.NoSessionError) and step not in checkpoints(self.local):
                    return False  # it was discarded
                if not _may_pass(error) or attempts >= _LAST_ATTEMPTS:
                    logger.exception(
                        "Could not upload %s to %s.", self.local / str(step), self.remote
                    )
                    return False
                logger.warning("Could not upload step %d, and tries again: %s", step, error)
                self._pause(_FIRST_PAUSE_SECS if attempts else pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECS)
            else:
                return True
        return False

    def _pause(self, secs: float) -> None:
        """Waits for so long, or until training ends."""
        with self._changed:
            if self._is_ending:
                self._changed.wait(min(secs, _FIRST_PAUSE_SECS))
            else:
                self._changed.wait_for(lambda: self._is_ending, secs)

    def _copy(self, step: int) -> None:
        source, target = self.local / str(step), self.remote / str(step)
        try:
            fp.copy(source, target, entered=self._require_held)
        except fp.CheckpointExistsError:
            self._require_held()
            fp.abort(target)  # it was left by whom this run has taken over; else this raises
            fp.copy(source, target, entered=self._require_held)
        logger.info("Uploaded %s to %s.", source, target)

    def _require_held(self) -> None:
        if not self._uploads.is_newest(self._number):
            raise _TakenOverError

    def _prune(self) -> None:
        """Removes from the local tier what is uploaded, but for the newest."""
        held = checkpoints(self.local)
        with self._changed:
            waiting = set(self._waiting[1:])
        for step in list(held)[: -self._keep_last]:
            if step not in waiting:
                with contextlib.suppress(fp.CheckpointInUseError, fp.NoSessionError):
                    fp.remove(held[step])


def _may_pass(error: Exception) -> bool:
    """Whether what failed may succeed later."""
    lasting = (fp.CheckpointExistsError, fp.StoreAccessError, fp.CorruptCheckpointError)
    return not isinstance(error, lasting)


def _settle(path: AnyPath, step: int) -> None:
    """Publishes an upload that is whole, or that is being published; drops one that is not."""
    with contextlib.suppress(fp.NoSessionError, fp.CheckpointExistsError):  # it is published now
        if completeness.missing(fp.status(path), step) is not None:
            try:
                fp.abort(path)
            except fp.CheckpointExistsError:
                logger.debug("%s is just being published: that is completed.", path)
            else:
                logger.info("Dropped %s, which another run was uploading.", path)
                return
        _publish(path)


def _publish(path: AnyPath) -> None:
    fp.finalize(path, processes=[jax.process_index()])
    logger.info("Published %s, which another run had uploaded.", path)
