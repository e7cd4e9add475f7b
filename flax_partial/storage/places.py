"""What a path leads to: the place of one checkpoint, whose rules are chosen by where it is."""

import os
from pathlib import Path
from typing import NamedTuple

from flax_partial.storage import locks, paths
from flax_partial.storage.control_objects import mark_of
from flax_partial.storage.local_place import LocalPlace
from flax_partial.storage.object_place import StorePlace
from flax_partial.storage.parts import part_names
from flax_partial.storage.paths import SESSION_SUFFIX, PathLike
from flax_partial.storage.place import Place
from flax_partial.storage.session_dir import CONTROL
from flax_partial.storage.store_path import StorePath, in_store
from flax_partial.storage.unlocked_place import UnlockedPlace


def resolve(path: PathLike | StorePath) -> Place:
    """Takes the path, or URL, of a checkpoint or of its session, as a user gives it.

    Raises:
      ImportError: It is a URL, and obstore is not installed.
      TypeError: It is not a path of text.
      ValueError: It has no last component that could name a checkpoint, or is a URL that nothing
        serves.
    """
    found = in_store(path)
    return _local(path) if found is None else _in_store(found)


def names_session(path: PathLike | StorePath) -> bool:
    """Whether a path is that of a session, not of the checkpoint that it becomes."""
    found = in_store(path)
    name = os.path.abspath(path) if found is None else found.name
    return name.endswith(SESSION_SUFFIX)


def _in_store(path: StorePath) -> StorePlace:
    name = path.name.removesuffix(SESSION_SUFFIX)
    if not name:
        raise ValueError(f"URL '{path}' does not name a checkpoint: give a key below a bucket")
    return StorePlace(path.with_name(name))


def _local(path: PathLike) -> LocalPlace:
    absolute, text = paths.absolute(path), os.fspath(path)
    session = absolute.removesuffix(SESSION_SUFFIX) + SESSION_SUFFIX
    known, found = _known.get(session), _found_at(session)
    if text and known is not None and known.found == found is not None:
        return known.place
    parent, name = os.path.split(absolute)
    name = name.removesuffix(SESSION_SUFFIX)
    if not text or not name or "\0" in text or not _is_utf8(text):
        raise ValueError(
            f"path {text!r} does not name a checkpoint: give a directory below a parent, in UTF-8"
        )
    if known is None or not _is_same_directory(parent, known.place.final.parent):
        final = Path(os.path.realpath(parent), name)
        place = LocalPlace(final, final.with_name(name + SESSION_SUFFIX))
    else:
        place = known.place
    if _has_no_locks(place):
        _known.pop(session, None)
        return UnlockedPlace(place.final, place.session)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[session] = _Known(place, found)
    return place


def _has_no_locks(place: LocalPlace) -> bool:
    """Whether a session is kept by control files. It goes on as it was begun, wherever that was.

    Of a checkpoint they say which parts count: beside these may lie what came too late.
    """
    if os.path.isdir(place.session / CONTROL) or os.path.isdir(place.final / CONTROL):
        return True
    directory = place.session.parent
    while not directory.exists():
        directory = directory.parent
    return not locks.are_shared(directory) and all(map(mark_of, part_names(place.state)))


class _Known(NamedTuple):
    """A place whose sessions are kept by locks, and the session that was found there, if one was.

    As long as the same directory is there, the same rules are its own, and links lead there still:
    a training step resolves its checkpoint's path for each layer, and all that takes 0.1 ms.
    """

    place: LocalPlace
    found: tuple[int, int] | None


_known: dict[str, _Known] = {}  # by the absolute path of the session, through links
_MOST_KNOWN = 256


def _found_at(session: str) -> tuple[int, int] | None:
    """Device and inode of what is at a session's path; None where there is nothing to be seen."""
    try:
        status = os.lstat(session)
    except (OSError, ValueError):  # a path that cannot be, which its name tells
        return None
    return status.st_dev, status.st_ino


def _is_same_directory(one: str, other: Path) -> bool:
    """Whether a path still leads to where it once led, and that is still there."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except OSError:
        return False


def _is_utf8(text: str) -> bool:
    """Whether tensorstore takes this path: it refuses surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
