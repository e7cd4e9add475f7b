"""Drops an unfinished checkpoint."""

from flax_partial.saving.save import forget, session_of
from flax_partial.storage import local as storage
from flax_partial.storage.local import PathLike


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
    where = storage.resolve(path)
    session = session_of(where)
    try:
        session.end_saves()
    finally:
        forget(session, for_good=True)
    with session.exclusively():
        storage.remove_session(where)
