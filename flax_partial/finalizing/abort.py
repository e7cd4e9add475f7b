"""Drops an unfinished checkpoint."""

from flax_partial.sessions import workers
from flax_partial.sessions.forks import check_not_forked
from flax_partial.sessions.handles import Handle
from flax_partial.sessions.registry import forget, session_of
from flax_partial.sessions.workers import Task
from flax_partial.storage import places
from flax_partial.storage.paths import PathLike
from flax_partial.storage.place import Place


def abort(path: PathLike) -> None:
    """Drops the unfinished checkpoint of `path`, and only that.

    Saves of this process that have not begun to write fail with `NoSessionError`; those that have
    are waited for, like those of other processes.

    Args:
      path: The checkpoint, or its session `<path>.partial_save`.

    Raises:
      NoSessionError: There is no session.
      CheckpointExistsError: What is at its place is not a session, or not only; it is kept.
      OSError: It cannot be removed.
    """
    check_not_forked("abort")
    where = places.resolve(path)
    workers.finalizing.run(Task(lambda _: _abort(where), Handle[None]()))


def _abort(where: Place) -> None:
    session = session_of(where)
    session.is_aborted = True  # what has not begun to write fails
    try:
        session.wait()
    finally:
        forget(session, for_good=True)
    with where.locked_exclusively():
        where.remove_session()
