"""The control objects of sessions: their names, and what a listing of these says.

They lie below `state/session/`. Each is put once:

    <n>.open, <n>.BEFORE.open    {"id": SESSION}: a session begins, the first one, or the next
                                 after BEFORE, which was dropped; that with the largest n counts
    SESSION.begun                it is, or is about to be, the one that such an object names
    SESSION.closing.ROUND.TOKEN  a process is about to end it: a save that sees this waits for the
                                 verdict of that round
    SESSION.withdrawn.PART       the save of that part has failed: it does not count
    SESSION.verdict[.ROUND]      the parts that the checkpoint is made of; or that it is dropped; or
                                 that no process ends it in that round: the next round begins
    SESSION.removed[.TAKEN]      a process removes its finalized checkpoint; the last one does that
                                 has taken over from one that died

When a checkpoint is removed all of these go, and names like `0.open` are used again. What holds the
name of a session in its own never is: a process that slept meanwhile finds by it that its session
is gone, and what it puts late counts for nothing. For that nothing of a session counts unless its
`begun` is there: this one is put before the session begins, and not again, so it is never late. A
removal deletes it when all else is gone.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from flax_partial.errors import CorruptCheckpointError
from flax_partial.storage.paths import STATE
from flax_partial.storage.store import Entry

MARK = "commit_success.txt"  # at the root of a finalized checkpoint, which it tells from others
CONTROL = f"{STATE}/session/"
ABORT, FINALIZE, VOID = "abort", "finalize", "void"
_FIRST_OPENING = "0.open"
_OPENING = re.compile(r"[0-9]+(\.[^.]+)?\.open")


class Verdict(NamedTuple):
    """How a session ended, or one round of it."""

    kind: str
    parts: tuple[str, ...] = ()
    committed_ns: int = 0


class Listed(NamedTuple):
    """A session as it was listed.

    Attributes:
      opening: Name of the object that it was opened by; empty where there is no session.
      id: Its name; empty where there is none.
      control: Names of the control objects.
      round: The round in which it is to be decided how it ends, or was.
      verdict: How it ended; None while that is not decided.
    """

    opening: str
    id: str
    control: frozenset[str]
    round: int = 0
    verdict: Verdict | None = None

    @property
    def is_closing(self) -> bool:
        """Whether a process is about to end it."""
        fence = f"{self.id}.closing.{self.round}."
        return any(name.startswith(fence) for name in self.control)

    @property
    def next_opening(self) -> str:
        """Name of the object that opens the session after it."""
        return f"{_number(self.opening) + 1}.{self.id}.open" if self.id else _FIRST_OPENING


def names_of(entries: Iterable[Entry]) -> frozenset[str]:
    """The names of the control objects in a listing."""
    keys = (entry.key for entry in entries if entry.key.startswith(CONTROL))
    return frozenset(key.removeprefix(CONTROL) for key in keys)


def verdict_name(session: str, number: int) -> str:
    """Name of the verdict of a round."""
    return f"{session}.verdict.{number}" if number else f"{session}.verdict"


def newest_opening(names: Collection[str]) -> str:
    """Name of the object that opened the newest session; empty where there is none."""
    return newest([name for name in names if is_opening(name) and counts(name, names)])


def newest(openings: Iterable[str]) -> str:
    """That with the largest number; empty where there is none."""
    return max(openings, key=lambda name: (_number(name), name), default="")


def is_opening(name: str) -> bool:
    """Whether it is the name of an object that opens a session."""
    return _OPENING.fullmatch(name) is not None


def begun_name(session: str) -> str:
    """Name of the object without which nothing of a session counts."""
    return f"{session}.begun"


def lives(session: str, names: Collection[str]) -> bool:
    """Whether a session, finalized or not, was not removed, nor is that going on."""
    return begun_name(session) in names and not removed_session(names)


def counts(opening: str, names: Collection[str]) -> bool:
    """Whether an object that opened a session is there, and so is the session before.

    It is not where its process slept while the checkpoint was removed, and another one was begun:
    that one must not be hidden.
    """
    before = session_before(opening)
    return opening in names and (not before or begun_name(before) in names)


def strangers(session: str, names: Collection[str]) -> set[str]:
    """Sessions that are begun beside one, and were not dropped before another one was opened."""
    begun = {name.removesuffix(".begun") for name in names if name.endswith(".begun")}
    return begun - {session, *(session_before(name) for name in names if is_opening(name))}


def session_before(opening: str) -> str:
    """The session that one follows, by the name of the object that opened it; empty for none."""
    return opening.removesuffix(".open").partition(".")[2]


def removed_session(names: Collection[str]) -> str:
    """The session whose finalized checkpoint is being removed; empty where none is."""
    ended = (name.partition(".removed")[0] for name in names if ".removed" in name)
    return next((session for session in ended if begun_name(session) in names), "")


def removed_name(session: str, taken: int) -> str:
    """Name of what a process puts that removes a checkpoint, after so many that have died."""
    return f"{session}.removed.{taken}" if taken else f"{session}.removed"


def times_taken(session: str, names: Collection[str]) -> int:
    """How many processes have taken a removal over."""
    prefix = f"{session}.removed."
    return max((int(name.removeprefix(prefix)) for name in names if prefix in name), default=0)


def read(data: bytes) -> dict[str, Any]:
    """Returns what a control object holds.

    Raises:
      CorruptCheckpointError: It is none.
    """
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CorruptCheckpointError(f"a control object holds {data[:100]!r}, which is no JSON")
    return found


def session_of(mark: bytes) -> str:
    """The session that became a checkpoint, by its mark; empty where another program wrote that."""
    try:
        return str(read(mark).get("session", ""))
    except CorruptCheckpointError:
        return ""


def write(value: Mapping[str, Any]) -> bytes:
    """Returns what a control object holds."""
    return json.dumps(value).encode()


def read_verdict(data: bytes) -> Verdict:
    """Returns a verdict, given the object."""
    found = read(data)
    kind, parts, committed_ns = (found.get(name) for name in Verdict._fields)
    parts = [] if parts is None else parts
    if kind not in (ABORT, FINALIZE, VOID) or not isinstance(parts, list):
        raise CorruptCheckpointError(f"a control object holds {data[:100]!r}, which is no verdict")
    return Verdict(kind, tuple(parts), committed_ns if isinstance(committed_ns, int) else 0)


def write_verdict(verdict: Verdict, by: str) -> bytes:
    """Returns the object that holds a verdict; `by` tells it from that of another process."""
    return write({**verdict._asdict(), "by": by})


def _number(opening: str) -> int:
    return int(opening.partition(".")[0])
