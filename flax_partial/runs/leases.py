"""Leases: how others see that a process lives where there are no locks.

A lease is an object that its holder puts anew every `RENEW_SECS`, with the next count in it:

    timeline/running.4      {"id": "6f0c...", "host": "node7", "process": 4711, "since": 1764246000,
                             "machine": {...}, "count": 17, "has_ended": false}

Clocks of two machines differ, so that their times are never compared. Processes that check whether
a holder lives watch its lease: renewed, it lives; unchanged for the grace, by their own clock, it
is dead. Time in which the storage did not answer is not counted. Of a process of the same machine
the system reports it instead, without waiting.

The number at the end makes a name that is never used again: a lease is taken by putting the next
one if it is absent, which one of several does, and the newest counts. A holder that was stopped for
longer than the grace finds out when it next renews its lease.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flax_partial.storage.store import Store

logger = logging.getLogger(__name__)

RENEW_SECS = 10.0
GRACE_SECS = 60.0
"""For how long a lease stands unchanged before its holder is taken for dead."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often leases are renewed, and looked at.

    Attributes:
      renew_secs: Between two renewals.
      grace_secs: For how long an unchanged lease is one of a holder that may live.
      poll_secs: Between two looks of one who watches.
      now: The monotonic clock, in seconds.
      sleep: Waits for some seconds.
    """

    renew_secs: float = RENEW_SECS
    grace_secs: float = GRACE_SECS
    poll_secs: float = 1.0
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


PACE = Pace()
"""The pace unless another one is given."""


class Sign(enum.Enum):
    """What is seen of a lease."""

    FREE = "none is held, or its holder is dead"
    LIVE = "its holder lives"
    UNKNOWN = "it is not known yet"


@dataclass
class Watch:
    """Checks whether the holder of a lease lives.

    Attributes:
      store: Where leases are.
      name: Of the lease, without its number.
      pace: How long to watch.
      number: Of the newest lease; 0 before the first.
      about: Its content.
    """

    store: Store
    name: str
    pace: Pace
    number: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    _seen: bytes | None = None
    _is_renewed: bool = False
    _unchanged_secs: float = 0.0
    _looked_at: float = 0.0

    def look(self) -> Sign:
        """Looks at the newest lease once."""
        number = max(numbers(self.store, self.name), default=0)
        data = self.store.get(_key(self.name, number)) if number else b""
        if data is None:  # its holder found out that it had lost it
            return Sign.UNKNOWN
        now = self.pace.now()
        if (number, data) == (self.number, self._seen):
            # An outage of the storage is no sign of death: what took long counts as one look.
            self._unchanged_secs += min(now - self._looked_at, 2 * self.pace.poll_secs)
        else:
            self._is_renewed = number == self.number and self._seen is not None
            self.number, self._seen, self._unchanged_secs = number, data, 0.0
            self.about = _parsed(data)
        self._looked_at = now
        if (
            not number
            or self.about.get("has_ended")
            or self._unchanged_secs >= self.pace.grace_secs
        ):
            return Sign.FREE
        is_there = _is_there(self.about)
        if is_there is not None:
            return Sign.LIVE if is_there and not _is_left(self.about) else Sign.FREE
        return Sign.LIVE if self._is_renewed else Sign.UNKNOWN

    def described(self) -> str:
        """Returns the holder of the lease, in words."""
        return described(self.about)


def described(about: Mapping[str, Any]) -> str:
    """Returns a process in words, from what it recorded about itself."""
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["since"]))
        return f"process {about['process']} on {about['host']}, since {since}"
    except (TypeError, ValueError, KeyError, OverflowError):  # it was made a moment ago
        return "which has just begun"


def about_this_process() -> dict[str, Any]:
    """What this process records about itself."""
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}


def holder(store: Store, name: str, pace: Pace | None = None) -> str | None:
    """Returns who holds a lease; None where no living process does.

    It waits while that is not known: until the lease is renewed, or for the grace.
    """
    pace = pace or PACE
    watch = Watch(store, name, pace)
    while (sign := watch.look()) is Sign.UNKNOWN:
        pace.sleep(pace.poll_secs)
    return watch.described() if sign is Sign.LIVE else None


class Lease:
    """A lease that this process holds, or tries to take."""

    def __init__(self, store: Store, name: str, pace: Pace | None = None) -> None:
        """Prepares a lease.

        Args:
          store: Where leases are.
          name: Of the lease, without its number.
          pace: How often it is renewed, and how long that of another process is watched.
        """
        self._store, self._name, self._pace = store, name, pace or PACE
        self._process = os.getpid()
        self._about: dict[str, Any] = {}
        self._number = 0
        self._stop = threading.Event()
        self._renewing = threading.Lock()
        self.lost_to: str | None = None
        """Which process has taken it, after this one did not renew it for the grace."""

    def take(self, timeout_secs: float = 0.0) -> str | None:
        """Takes the lease, and renews it from now on.

        Args:
          timeout_secs: For how long to wait for a holder that lives. For one that may be dead it
            waits in any case, at most for the grace.

        Returns:
          Who holds it instead; None if this process does now.

        Raises:
          OSError: The storage failed.
        """
        watch = Watch(self._store, self._name, self._pace)
        began, is_told = self._pace.now(), False
        while True:
            sign = watch.look()
            if sign is Sign.FREE:
                if self._put_next(watch):
                    return None
                continue
            if sign is Sign.LIVE and self._pace.now() - began >= timeout_secs:
                return watch.described()
            if not is_told:
                is_told = True
                logger.warning(
                    "Waiting to see whether another process still holds %s/%s (%s): one that is "
                    "dead is known by its lease, which is not renewed for %g s.",
                    *(self._store.url, self._name, watch.described(), self._pace.grace_secs),
                )
            self._pace.sleep(self._pace.poll_secs)

    def _put_next(self, watch: Watch) -> bool:
        about = {"id": uuid.uuid4().hex, **about_this_process(), "machine": _machine()}
        self._about = {**about, "count": 0, "has_ended": False}
        number = watch.number + 1
        _held.add(self)
        try:
            is_mine = self._store.put_new(_key(self._name, number), _encoded(self._about))
        except BaseException:
            _held.discard(self)
            raise
        if not is_mine:
            _held.discard(self)
            return False
        self._number = number
        if watch.about and not watch.about.get("has_ended"):
            logger.warning(
                "Took over %s/%s from a process that has died: %s.",
                *(self._store.url, self._name, watch.described()),
            )
        _held.add(self)
        with contextlib.suppress(OSError):  # the next one deletes them
            self._delete_older()
        # A daemon, so that a process whose main thread has ended does not stay for it.
        arguments = (weakref.ref(self), self._stop, self._pace.renew_secs)
        name = "flax_partial-lease"
        threading.Thread(target=_renew_often, args=arguments, name=name, daemon=True).start()
        return True

    @property
    def id(self) -> str:
        """What tells it from all others."""
        return str(self._about.get("id", ""))

    @property
    def _key(self) -> str:
        return _key(self._name, self._number)

    def _delete_older(self) -> None:
        older = [one for one in numbers(self._store, self._name) if one < self._number]
        self._store.delete([_key(self._name, one) for one in older])

    def renew(self) -> None:
        """Renews it, and finds out whether another process has taken it.

        Raises:
          OSError: The storage failed.
        """
        with self._renewing:
            if self._stop.is_set():
                return
            self._about["count"] += 1
            self._store.put(self._key, [_encoded(self._about)])
            newest = max(numbers(self._store, self._name), default=0)
            if newest > self._number:
                data = self._store.get(_key(self._name, newest))
                self.lost_to = described(_parsed(data or b""))
                logger.error(
                    "%s/%s was taken by another process (%s): this one had not renewed its lease "
                    "for %g s.",
                    *(self._store.url, self._name, self.lost_to, self._pace.grace_secs),
                )

    def release(self) -> None:
        """Gives it back; a second call does nothing, nor does one in a forked child."""
        if self._process != os.getpid() or self._stop.is_set() or not self._number:
            return
        self._stop.set()
        _held.discard(self)
        with self._renewing, contextlib.suppress(OSError):  # the thread ends some time later
            if self.lost_to is None:
                self._about["has_ended"] = True
                self._store.put(self._key, [_encoded(self._about)])
            else:
                self._store.delete([self._key])

    def __del__(self) -> None:
        self.release()


def _renew_often(found: weakref.ref[Lease], stop: threading.Event, renew_secs: float) -> None:
    """Renews a lease until it is given back, taken by another process, or forgotten."""
    has_failed = False
    while not stop.wait(renew_secs):
        lease = found()
        if lease is None or lease.lost_to is not None:
            return
        try:
            lease.renew()
        except OSError as error:
            if not has_failed:
                logger.warning("Could not renew a lease: %s", error)
            has_failed = True
        else:
            has_failed = False
        del lease


_held: weakref.WeakSet[Lease] = weakref.WeakSet()


@atexit.register
def _release_all() -> None:
    for lease in tuple(_held):
        lease.release()


os.register_at_fork(after_in_child=_held.clear)


def numbers(store: Store, name: str) -> list[int]:
    """Returns the numbers of the leases of a name that are there, in no order."""
    folder, _, own = name.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    begins = f"{prefix}{own}."
    keys = [one.key for one in store.children(prefix)[1]]
    ends = [key.removeprefix(begins) for key in keys if key.startswith(begins)]
    return [int(end) for end in ends if end.isdecimal()]


def _key(name: str, number: int) -> str:
    return f"{name}.{number}"


def _encoded(about: Mapping[str, Any]) -> bytes:
    return json.dumps(about).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict):
            return found
    return {}


def _machine() -> dict[str, Any] | None:
    """What identifies this process among all others, ended ones too; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # In containers of one machine the same numbers stand for other processes.
        numbered_by = Path("/proc/self/ns/pid").readlink()
        return {"boot": boot, "pids": str(numbered_by), "started": _started(os.getpid())}
    except OSError:
        return None


def _started(process: int) -> int | None:
    """When a process was started, as proc_pid_stat(5) has it; None if it is only left to be reaped.

    Raises:
      OSError: It is not there, or may not be seen.
    """
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _is_left(about: Mapping[str, Any]) -> bool:
    """Whether this process holds it no more: the disk failed as it was put, or given back."""
    ours = {lease.id for lease in tuple(_held)}
    return about.get("process") == os.getpid() and about.get("id") not in ours


def _is_there(about: Mapping[str, Any]) -> bool | None:
    """Whether a process of this machine is there; None for one of another, or if unknown."""
    theirs, ours, process = about.get("machine"), _machine(), about.get("process")
    if not (isinstance(theirs, dict) and ours and isinstance(process, int) and process > 0):
        return None
    if about.get("host") != socket.gethostname():
        return None
    if any(theirs.get(name) != ours[name] for name in ("boot", "pids")):
        return None
    try:
        with contextlib.suppress(PermissionError):  # it is there, and of another user
            os.kill(process, 0)
        return _started(process) == theirs.get("started")
    except ProcessLookupError:
        return False
    except OSError:  # it may not be looked at
        return None
