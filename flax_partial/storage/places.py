"""What a path leads to: the place of one checkpoint, whose rules are chosen by where it is."""

import os
from pathlib import Path

from flax_partial.storage import locks, paths
from flax_partial.storage.local_place import LocalPlace
from flax_partial.storage.object_place import StorePlace, mark_of
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
    parent, name = os.path.split(paths.absolute(path))
    text = os.fspath(path)
    name = name.removesuffix(SESSION_SUFFIX)
    if not text or not name or "\0" in text or not _is_utf8(text):
        raise ValueError(
            f"path {text!r} does not name a checkpoint: give a directory below a parent, in UTF-8"
        )
    found = _known_paths.get((parent, name))
    if found is None or not _is_same_directory(parent, found.final.parent):
        final = Path(os.path.realpath(parent), name)
        if len(_known_paths) >= _MOST_KNOWN_PATHS:
            _known_paths.clear()
        found = LocalPlace(final, final.with_name(name + SESSION_SUFFIX))
        _known_paths[parent, name] = found
    return UnlockedPlace(found.final, found.session) if _has_no_locks(found) else found


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


# Following links costs 60 us, and a training step resolves its checkpoint's path for each layer.
_known_paths: dict[tuple[str, str], LocalPlace] = {}


_MOST_KNOWN_PATHS = 256


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
