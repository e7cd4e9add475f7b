"""Where a checkpoint and its session are, and what the files and directories in them are called."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

PathLike = str | os.PathLike[str]
# Of at least two letters, or it might be a drive; pathlib makes one slash of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_USER_AND_PARAMETERS = re.compile(r"(:/+)(?:[^/\s?@]*@)?([^\s?]*)(?:\?\S*)?")  # of a URL
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
            f"path {without_secrets(text)!r} is a URL that is not served here. What is: paths of a "
            "file system, and for checkpoints s3://, gs://, az:// and memory://. (A directory that "
            "is called so can be given by its absolute path.)"
        )
    found = os.path.expanduser(text)
    if found.split("/", 1)[0] == "~":
        raise ValueError(f"path {text!r}: the home directory is not known; set HOME")
    return found


def absolute(path: PathLike) -> str:
    """Makes a path that a user gives absolute, as `expanded` takes it."""
    return os.path.abspath(expanded(path))


def without_secrets(text: str) -> str:
    """Leaves out of each URL in a text its user and its parameters, which may be secrets."""
    return _USER_AND_PARAMETERS.sub(r"\1\2", text)
