"""Which process this is, and how several agree on an outcome. Through JAX's own runtime only.

There is no collective and no barrier: each process posts that it is ready, the primary waits for
all of them, acts, and posts a verdict. Posts can be read late, from any thread, and a process that
never posts is known by its number. Keys carry the number of the attempt, which every process
counts for itself: a failed attempt costs its participants one call each, so they stay in step.

The process that sets the key `fate` first decides an attempt: the primary, and then it acts; or
another one whose time is up, and then the primary, should it still come, does not act any more. So
no attempt fails for one process and is carried out for another, unless the primary dies meanwhile,
or JAX's coordination service stops for a while.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax_partial import errors
from flax_partial.distributed.jax_service import Service, client, count, index
from flax_partial.errors import IncompleteCheckpointError, PartialCheckpointError

__all__ = ["DEFAULT_TIMEOUT_SECS", "agree", "count", "index"]

# JAX aborts every process 100 s after one of them died (its heartbeat timeout): report it before.
DEFAULT_TIMEOUT_SECS = 90.0

_ROOT = "flax_partial"
_LONGEST_PAUSE_SECS = 0.1
_SLACK_SECS = 1.0  # for which others wait longer than the primary, so that its verdict arrives
_LONGEST_WAIT_SECS = 2.0  # in one call: so long one that was interrupted goes on
_ANSWER_SECS = 2.0  # for which the service is given time to answer, when all other time is up

_lock = threading.Lock()
_attempts: dict[str, int] = {}
_attempts_of: list[Any] = [None]  # the client that the attempts were counted with


def agree(
    subject: str,
    *,
    ready: Callable[[], Any],
    act: Callable[[Mapping[int, Any]], Any],
    participants: Iterable[int] | None = None,
    awaited: Iterable[int] | None = None,
    timeout_secs: float = DEFAULT_TIMEOUT_SECS,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Lets the first of several processes act once, when all are ready; all get the outcome.

    Every participant calls it with the same `subject`; it can be called again after any outcome,
    and from any thread. It uses JAX's coordination service, and no device. Where there is but one
    participant, this is `act({index: ready()})`.

    Args:
      subject: What it is about.
      ready: What this process has to do before; if it raises, no process acts. Returns JSON.
      act: What the first participant does, given the index of each process that was ready by then,
        and what its `ready` returned. Returns JSON.
      participants: Indices of the processes that call this, of which the lowest acts; by default
        all.
      awaited: Those for which it waits before it acts; by default all participants.
      timeout_secs: For how many seconds to wait for other processes. Once the first participant
        acts, the others wait for it as long again.
      sleep: Sleeps for so many seconds between two looks; what it raises ends the wait.

    Returns:
      What `act` returned, in every process.

    Raises:
      IncompleteCheckpointError: Some process was not ready in time, or did not answer; it is named.
        Or JAX's coordination service did not.
      PartialCheckpointError: What `ready` or `act` raised, in whichever process: of the same type
        everywhere, like an OSError.
    """
    those = tuple(range(count())) if participants is None else tuple(sorted(set(participants)))
    if len(those) <= 1:
        return act({index(): ready()})
    needed = those if awaited is None else tuple(sorted(set(awaited)))
    connection = client()
    root = _next_attempt(connection, f"{subject}:{_listed(those)}:{_listed(needed)}")
    attempt = _Attempt(Service(connection), root, those, needed, timeout_secs, sleep)
    said = _outcome(ready)
    verdict = attempt.lead(said, act) if index() == those[0] else attempt.follow(said)
    return verdict.value()


def _next_attempt(connection: Any, name: str) -> str:
    with _lock:
        if _attempts_of[0] is not connection:  # jax.distributed was started anew
            _attempts.clear()
            _attempts_of[0] = connection
        _attempts[name] = _attempts.get(name, 0) + 1
        return f"{_ROOT}/{name}/{_attempts[name]}"


@dataclass
class _Outcome:
    """What a call returned, or the error it raised."""

    returned: Any = None
    error: Exception | None = None

    def value(self) -> Any:
        """Returns or raises it."""
        if self.error is not None:
            raise self.error
        return self.returned

    def to_json(self) -> str:
        """What others read of it."""
        if self.error is None:
            return json.dumps({"returned": self.returned})
        number = self.error.errno if isinstance(self.error, OSError) else None
        name = type(self.error).__name__
        return json.dumps({"type": name, "text": str(self.error), "errno": number})

    @classmethod
    def from_json(cls, text: str, process: int) -> "_Outcome":
        """What another process wrote with `to_json`."""
        said = json.loads(text)
        if "type" not in said:
            return cls(said["returned"])
        text = f"process {process}: {said['text']}"
        kind = getattr(errors, said["type"], None)
        if isinstance(kind, type) and issubclass(kind, PartialCheckpointError):
            return cls(error=kind(text))
        if said["errno"]:
            return cls(error=OSError(said["errno"], f"{os.strerror(said['errno'])} ({text})"))
        return cls(error=PartialCheckpointError(f"{said['type']}: {text}"))


def _outcome(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work())
    except Exception as error:  # noqa: BLE001 - it is sent to all, and raised by each
        return _Outcome(error=error)


@dataclass
class _Attempt:
    """One attempt to agree, of which all that is posted lies under `root`."""

    service: Service
    root: str
    participants: Sequence[int]
    awaited: Sequence[int]
    timeout_secs: float
    sleep: Callable[[float], None]
    deadline: float = 0.0

    def lead(self, mine: _Outcome, act: Callable[[Mapping[int, Any]], Any]) -> _Outcome:
        """What the primary does: waits for the others, acts, and publishes the outcome."""
        self._post_ready(mine)
        said = self._wait_for_others() | {index(): mine}
        verdict = next((one for one in said.values() if one.error is not None), None)
        verdict = verdict or self._absence(said)
        if verdict is None:
            verdict = self._withdrawal() or _outcome(
                lambda: act({process: one.returned for process, one in sorted(said.items())})
            )
        secs = max(self.timeout_secs, _ANSWER_SECS)  # however long it took to act
        self.service.set(f"{self.root}/verdict", verdict.to_json(), secs=secs)
        # A process that comes now needs the verdict only.
        self.service.delete(f"{self.root}/ready", secs=secs)
        return verdict

    def follow(self, mine: _Outcome) -> _Outcome:
        """What the others do; a process whose `ready` raised raises that."""
        self._post_ready(mine)
        verdict = self._verdict(self.timeout_secs + _SLACK_SECS)
        if verdict is None and self._decide() == self.participants[0]:
            verdict = self._verdict(self.timeout_secs)
        if verdict is None:
            verdict = self._absence(self._said()) or _Outcome(error=self._no_answer())
        return mine if mine.error is not None else verdict

    def _post_ready(self, mine: _Outcome) -> None:
        """From now on time counts."""
        self.deadline = time.monotonic() + self.timeout_secs
        self.service.set(f"{self.root}/ready/{index()}", mine.to_json(), secs=self._left)

    @property
    def _left(self) -> float:
        """For how many seconds the service is waited for."""
        return max(self.deadline - time.monotonic(), _ANSWER_SECS)

    def _said(self) -> dict[int, _Outcome]:
        posts = self.service.below(f"{self.root}/ready", secs=self._left)
        numbered = [(int(key), text) for key, text in posts.items()]
        return {process: _Outcome.from_json(text, process) for process, text in numbered}

    def _wait_for_others(self) -> dict[int, _Outcome]:
        """Waits until all have posted, one has failed, or time is up; returns what they posted."""
        pause = 0.002
        while True:
            said = self._said()
            is_decided = any(one.error for one in said.values()) or said.keys() >= {*self.awaited}
            if is_decided or time.monotonic() >= self.deadline:
                return said
            self.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)

    def _absence(self, said: Mapping[int, _Outcome]) -> _Outcome | None:
        missing = sorted({*self.awaited, self.participants[0]} - said.keys())
        if not missing:
            return None
        return _Outcome(
            error=IncompleteCheckpointError(
                f"After {self.timeout_secs:g} s these processes had not come: {missing}. "
                "Nothing was lost: call it again in every process."
            )
        )

    def _withdrawal(self) -> _Outcome | None:
        decided = self._decide()
        if decided == index():
            return None
        return _Outcome(
            error=IncompleteCheckpointError(
                f"Process {decided} had waited for {self.timeout_secs:g} s and given up before "
                f"process {index()} came. Nothing was lost: call it again in every process."
            )
        )

    def _decide(self) -> int:
        """Sets the outcome of this attempt unless it is set; returns the process that set it."""
        return int(self.service.set_once(f"{self.root}/fate", str(index()), secs=self._left))

    def _verdict(self, secs: float) -> _Outcome | None:
        deadline = time.monotonic() + secs
        while (left := deadline - time.monotonic()) > 0:
            self.sleep(0.0)
            wait_secs = min(left, _LONGEST_WAIT_SECS)
            text = self.service.wait_for(f"{self.root}/verdict", secs=wait_secs)
            if text is not None:
                return _Outcome.from_json(text, self.participants[0])
        return None

    def _no_answer(self) -> IncompleteCheckpointError:
        return IncompleteCheckpointError(
            f"Process {self.participants[0]} came, and gave no answer within "
            f"{self.timeout_secs:g} s: it may have died. Nothing was lost: look whether the "
            "checkpoint is there, and if not, finalize it again."
        )


def _listed(processes: Iterable[int]) -> str:
    return ",".join(map(str, processes))
