"""The removal of a finalized checkpoint from an object store; see `object_place`."""

import time
import uuid

from flax_partial.storage import control
from flax_partial.storage.control import CONTROL, MARK
from flax_partial.storage.store import Store

_REMOVAL_SECS = 30.0  # for which a removal is left to the process that has begun it
_LONGEST_PAUSE_SECS = 0.5


def remove(store: Store, session: str) -> bool:
    """Removes the checkpoint that a session has become; returns whether this process has done it.

    Another one may remove it already: that is waited for, or taken over.
    """
    is_first = _begin(store, session, 0)
    return _delete_all(store, session, 0) if is_first else finish(store, session)


def finish(store: Store, session: str, *, waits: bool = True) -> bool:
    """Waits until a checkpoint is removed; takes that over from a process that does not end it.

    Returns:
      Whether this process has done it.
    """
    pause = 0.01
    while True:
        names = control.names_of(store.list(CONTROL))
        if control.removed_session(names) != session:
            return False
        taken = control.times_taken(session, names)
        left = _secs_left(store, control.removed_name(session, taken))
        if left <= 0 and _begin(store, session, taken + 1):
            return _delete_all(store, session, taken + 1)
        if not waits:
            return False
        time.sleep(min(pause, max(left, 0.0)))
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECS)


def _begin(store: Store, session: str, taken: int) -> bool:
    """Puts that this process removes a checkpoint; returns whether no other one does."""
    told = control.write({"at": time.time(), "by": uuid.uuid4().hex})
    return store.put_new(CONTROL + control.removed_name(session, taken), told)


def _secs_left(store: Store, name: str) -> float:
    """For how many seconds it is that process's to remove a checkpoint which has put this."""
    data = store.get(CONTROL + name)
    at: float = control.read(data or b"{}").get("at", 0.0)
    return min(at - time.time(), 0.0) + _REMOVAL_SECS


def _delete_all(store: Store, session: str, taken: int) -> bool:
    """Deletes a checkpoint of which this process has put that it removes it.

    First the mark: from then on no reader takes what is left for a checkpoint. Last what tells
    others that it is being removed: until then no session begins.

    Returns:
      False where another process has removed it, or taken that over, by now.
    """
    listed_at = time.monotonic()
    entries = store.list()
    names = control.names_of(entries)
    if control.begun_name(session) not in names:
        store.delete([CONTROL + control.removed_name(session, taken)])
        return False
    if control.times_taken(session, names) != taken:
        return False
    last = [CONTROL + control.begun_name(session)]
    last += [f"{CONTROL}{name}" for name in names if name.startswith(f"{session}.removed")]
    rest = [entry.key for entry in entries if entry.key not in last]
    for doomed in ([MARK], rest, last):
        if time.monotonic() - listed_at > _REMOVAL_SECS:  # it was stopped: look anew
            return _delete_all(store, session, taken)
        store.delete(doomed)
    return True
