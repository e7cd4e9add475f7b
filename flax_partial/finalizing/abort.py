"""Drops an unfinished checkpoint."""

from flax_partial.errors import CheckpointInUseError
from flax_partial.finalizing.deadline import Deadline, check_timeout
from flax_partial.sessions import workers
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.registry import forget, session_of
from flax_partial.sessions.workers import Task
from flax_partial.storage import places
from flax_partial.storage.paths import PathLike
from flax_partial.storage.place import Place


def abort(path: PathLike, *, timeout_secs: float | None = None) -> None:
    """Drops the unfinished checkpoint of `path`, and only that.

    Saves of this process that have not begun to write fail with `NoSessionError`; those that have
    are waited for, like those of other processes.

    Args:
      path: The checkpoint, or its session `<path>.partial_save`.
      timeout_secs: For how many seconds to wait for those; None for as long as they take.

    Raises:
      NoSessionError: There is no session.
      CheckpointExistsError: What is at its place is not a session, or not only; it is kept.
      CheckpointInUseError: Some save had not ended when time was up; the session is kept, but
        saves of this process that had not begun to write have failed.
      OSError: It cannot be removed.
    """
    check_not_forked("abort")
    where = places.resolve(path)
    check_timeout(timeout_secs)

    def work(task: Task[None]) -> None:
        _abort(where, Deadline(task, timeout_secs, CheckpointInUseError))

    workers.finalizing.run(Task(work, Handle[None]()))


def _abort(where: Place, deadline: Deadline) -> None:
    session = session_of(where)
    session.is_aborted = True  # what has not begun to write fails
    try:
        deadline.wait_for_saves(session)
    finally:
        forget(session, for_good=True)
    with deadline.locked(where):
        where.remove_session()
