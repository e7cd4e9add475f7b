"""Where a checkpoint and its session are, and what the files and directories in them are called."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

PathLike = str | os.PathLike[str]
# Of at least two letters, or it might be a drive; pathlib makes one slash of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
SESSION_SUFFIX = ".partial_save"
DELETED_SUFFIX = ".deleted"  # of what is being removed, or was when it was killed
PART_PREFIX = "part."
PART_FOLDER = re.compile(r"p[0-9]{1,9}")  # of the parts of some processes among very many
PART_TABLE = "part.json"
CONTENTS = "contents.json"
STATE = "state"


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """Where a checkpoint is, or will be.

    Attributes:
      final: The finalized checkpoint; absolute, its parent without symbolic links.
      session: The directory of the unfinished one.
    """

    final: Path
    session: Path

    @property
    def state(self) -> Path:
        """The session's directory of parts."""
        return self.session / STATE

    @property
    def finalized(self) -> "CheckpointPath":
        """The same checkpoint once it is finalized: its parts are at its final place."""
        return CheckpointPath(self.final, self.final)


def expanded(path: PathLike) -> str:
    """Takes a path as a user gives it, and puts the home directory for `~`.

    Raises:
      TypeError: It is not a path of text.
      ValueError: It is a URL, or there is no home directory.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or an os.PathLike of str, not {type(text).__name__}")
    if _URL.match(text):
        raise ValueError(
            f"path {text!r} is a URL, and only local and shared file systems are supported. (A "
            "directory that is called so can be given by its absolute path.)"
        )
    found = os.path.expanduser(text)
    if found.split("/", 1)[0] == "~":
        raise ValueError(f"path {text!r}: the home directory is not known; set HOME")
    return found


def absolute(path: PathLike) -> str:
    """Makes a path that a user gives absolute, as `expanded` takes it."""
    return os.path.abspath(expanded(path))


def resolve(path: PathLike) -> CheckpointPath:
    """Takes the path of a checkpoint, or of its session, as a user gives it.

    Raises:
      TypeError: It is not a path of text.
      ValueError: It has no last component that could name a checkpoint, or is a URL.
    """
    parent, name = os.path.split(absolute(path))
    text = os.fspath(path)
    name = name.removesuffix(SESSION_SUFFIX)
    if not text or not name or "\0" in text or not _is_utf8(text):
        raise ValueError(
            f"path {text!r} does not name a checkpoint: give a directory below a parent, in UTF-8"
        )
    known = _known_paths.get((parent, name))
    if known is not None and _is_same_directory(parent, known.final.parent):
        return known
    final = Path(os.path.realpath(parent), name)
    if len(_known_paths) >= _MOST_KNOWN_PATHS:
        _known_paths.clear()
    found = CheckpointPath(final, final.with_name(name + SESSION_SUFFIX))
    _known_paths[parent, name] = found
    return found


def names_session(path: PathLike) -> bool:
    """Whether a path is that of a session, not of the checkpoint that it becomes."""
    return os.path.abspath(path).endswith(SESSION_SUFFIX)


# Following links costs 60 us, and a training step resolves its checkpoint's path for each layer.
_known_paths: dict[tuple[str, str], CheckpointPath] = {}


_MOST_KNOWN_PATHS = 256


def _is_same_directory(one: str, other: Path) -> bool:
    """Whether a path still leads to where it once led, and that is still there."""
    try:
        return os.path.samestat(os.stat(one), os.stat(other))
    except OSError:
        return False


def _is_utf8(text: str) -> bool:
    """Whether tensorstore can be told of this path: it knows no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
