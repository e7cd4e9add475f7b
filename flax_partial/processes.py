"""Which process this is, and how several agree on an outcome. Through JAX's own runtime only.

JAX has no public access to its coordination service. All use of the private one stands here: the
client of `jax._src.distributed.global_state`, of which `key_value_set`, `key_value_dir_get` and
`blocking_key_value_get` are used. Should it move, this module is what to change.

There is no collective and no barrier: each process posts that it is done, the primary waits for all
of them, acts, and posts a verdict. Posts can be read late, from any thread, and a process that
never posts is known by its number. Keys carry the number of the attempt, which every process
counts for itself: a failed attempt costs its participants one call each, so they stay in step.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax._src import distributed

from flax_partial import errors
from flax_partial.errors import IncompleteCheckpointError, PartialCheckpointError

_ROOT = "flax_partial/finalize"
_LONGEST_PAUSE_SECS = 0.1
_SLACK_SECS = 5.0  # for which others wait longer than the primary, so that its verdict arrives

_lock = threading.Lock()
_attempts: dict[str, int] = {}
_attempts_of: list[Any] = [None]  # the client that the attempts were counted with


def index() -> int:
    """Index of this process; 0 where `jax.distributed` was not initialized. Starts no backend."""
    return distributed.global_state.process_id or 0


def count() -> int:
    """Number of processes; 1 where `jax.distributed` was not initialized."""
    return distributed.global_state.num_processes or 1


def agree(
    subject: str,
    *,
    participants: Sequence[int],
    awaited: Sequence[int],
    ready: Callable[[], None],
    act: Callable[[], None],
    timeout_secs: float,
) -> None:
    """Has the first of several processes act once, when all are ready; all learn what came of it.

    Args:
      subject: What it is about; the same text in every process.
      participants: Ascending indices of the processes that call this; the first is the primary.
      awaited: Those for which the primary waits before it acts.
      ready: What this process has to do before; if it raises, the primary does not act.
      act: What the primary does.
      timeout_secs: For how many seconds the primary waits for the others.

    Raises:
      IncompleteCheckpointError: Some process was not ready in time; it names them.
      PartialCheckpointError: What `ready` or `act` raised, in whichever process: of the same type
        everywhere, like an OSError.
    """
    client = distributed.global_state.client
    root = _next_attempt(client, subject, participants)
    failure = _failure_of(ready)
    if index() != participants[0]:
        _post(client, f"{root}/ready/{index()}", failure)
        _raise(_verdict(client, root, participants[0], timeout_secs), failure)
        return
    said = {index(): failure} | _said(client, root, awaited, timeout_secs)
    verdict = next(filter(None, said.values()), None) or _absent(said, awaited, timeout_secs)
    raised: BaseException | None = failure
    if verdict is None:
        _post(client, f"{root}/acting", None)
        raised = verdict = _failure_of(act)
    _post(client, f"{root}/verdict", verdict)
    _raise(verdict, raised)


def _next_attempt(client: Any, subject: str, participants: Sequence[int]) -> str:
    with _lock:
        if _attempts_of[0] is not client:  # jax.distributed was started anew
            _attempts.clear()
            _attempts_of[0] = client
        name = f"{subject}:{','.join(map(str, participants))}"
        _attempts[name] = _attempts.get(name, 0) + 1
        return f"{_ROOT}/{name}/{_attempts[name]}"


def _failure_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - it is told to all, and raised by each
        return error
    return None


def _post(client: Any, key: str, failure: Exception | None) -> None:
    client.key_value_set(key, json.dumps(_to_json(failure)))


def _to_json(failure: Exception | None) -> dict[str, Any]:
    if failure is None:
        return {}
    number = failure.errno if isinstance(failure, OSError) else None
    return {"type": type(failure).__name__, "text": str(failure), "errno": number}


def _from_json(said: dict[str, Any], process: int) -> Exception | None:
    if not said:
        return None
    text = f"process {process}: {said['text']}"
    kind = getattr(errors, said["type"], None)
    if isinstance(kind, type) and issubclass(kind, PartialCheckpointError):
        return kind(text)
    if said["errno"]:
        return OSError(said["errno"], f"{os.strerror(said['errno'])} ({text})")
    return PartialCheckpointError(f"{said['type']}: {text}")


def _said(
    client: Any, root: str, awaited: Sequence[int], timeout_secs: float
) -> dict[int, Exception | None]:
    """Waits until all have posted, one has failed, or time is up; returns what they posted."""
    deadline = time.monotonic() + timeout_secs
    pause = 0.002
    while True:
        found = {
            int(key.rsplit("/", 1)[1]): json.loads(value)
            for key, value in client.key_value_dir_get(f"{root}/ready/")
        }
        said = {process: _from_json(value, process) for process, value in found.items()}
        if any(said.values()) or said.keys() >= set(awaited) - {index()}:
            return said
        if time.monotonic() >= deadline:
            return said
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_SECS)


def _absent(
    said: dict[int, Exception | None], awaited: Sequence[int], timeout_secs: float
) -> Exception | None:
    missing = sorted(set(awaited) - said.keys())
    if not missing:
        return None
    return IncompleteCheckpointError(
        f"After {timeout_secs:g} s these processes had not called finalize: {missing}. "
        "Nothing was lost: call it again."
    )


def _verdict(client: Any, root: str, primary: int, timeout_secs: float) -> Exception | None:
    deadline = time.monotonic() + timeout_secs + _SLACK_SECS
    is_extended = False
    while True:
        posts = dict(client.key_value_dir_get(f"{root}/"))
        for key, value in posts.items():
            if key.endswith("/verdict"):
                return _from_json(json.loads(value), primary)
        if time.monotonic() >= deadline:
            is_acting = any(key.endswith("/acting") for key in posts)
            if is_extended or not is_acting:
                break
            is_extended, deadline = True, deadline + timeout_secs
        time.sleep(_LONGEST_PAUSE_SECS / 10)
    return IncompleteCheckpointError(
        f"Process {primary}, which finalizes, gave no answer within {timeout_secs:g} s. "
        "Nothing was lost: look whether the checkpoint is there, and call finalize again."
    )


def _raise(verdict: Exception | None, own: BaseException | None) -> None:
    """Raises the verdict; this process's own error where that is what it is about."""
    if own is not None:
        raise own
    if verdict is not None:
        raise verdict
