"""JAX's coordination service: the one module that uses private names of JAX.

JAX has no public access to its service. Here stand all uses of the private one: the fields of
`jax._src.distributed.global_state`; of its client, `key_value_set`, `key_value_dir_get`,
`key_value_delete` and `blocking_key_value_get`; how the service itself is started; and
`jax._src.xla_bridge.backends_are_initialized`. Should they move, this module is what to change.

No call takes longer than its timeout. JAX's own wait for 100 s where the process that the service
runs in is stopped, or its machine has gone without closing its connections.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from jax._src import distributed, xla_bridge
from jax._src.lib import _jax  # type: ignore[attr-defined] # no stub names it
from jax.errors import JaxRuntimeError

from flax_partial.errors import IncompleteCheckpointError

# What `jax.distributed.initialize` starts its own with: a process that is not heard of for so long
# is dead to the service, which then has JAX end all others.
_HEARTBEAT_TIMEOUT_SECS = 100
_SHUTDOWN_TIMEOUT_SECS = 10
_MARGIN_SECS = 2.0  # beyond what a call waits by itself, which a busy machine takes to answer


def index() -> int:
    """Index of this process; 0 where `jax.distributed` was not initialized. Starts no backend."""
    return distributed.global_state.process_id or 0


def count() -> int:
    """Number of processes; 1 where `jax.distributed` was not initialized."""
    return distributed.global_state.num_processes or 1


def has_started_a_backend() -> bool:
    """Whether JAX has threads in this process by now."""
    return bool(xla_bridge.backends_are_initialized())


def client() -> Any:
    """What connects this process with the service: another one once JAX is initialized anew."""
    return distributed.global_state.client


class Service:
    """Texts by key that all processes share. Its calls may come from any thread.

    Each raises IncompleteCheckpointError if the service does not answer within `secs`, or not at
    all.
    """

    def __init__(self, connection: Any) -> None:
        self._client = connection

    def set(self, key: str, text: str, *, secs: float) -> None:
        """Sets a key that is not set yet."""
        _answer(lambda: self._client.key_value_set(key, text), secs)

    def set_once(self, key: str, text: str, *, secs: float) -> str:
        """Sets a key unless it is set; returns its value."""

        def attempt() -> None:
            try:
                self._client.key_value_set(key, text)
            except JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    raise

        _answer(attempt, secs)
        found = self.wait_for(key, secs=secs)
        if found is None:
            raise _silence(secs)
        return found

    def below(self, folder: str, *, secs: float) -> dict[str, str]:
        """Returns what is set directly below `folder/`, without that in the keys."""
        posts = _answer(lambda: self._client.key_value_dir_get(f"{folder}/"), secs)
        return {key.rsplit("/", 1)[1]: text for key, text in posts}

    def delete(self, folder: str, *, secs: float) -> None:
        """Deletes all below `folder/`."""
        _answer(lambda: self._client.key_value_delete(f"{folder}/"), secs)

    def wait_for(self, key: str, *, secs: float) -> str | None:
        """Returns the text of a key as soon as it is set; None if that takes longer than `secs`."""

        def get() -> str | None:
            try:
                text: str = self._client.blocking_key_value_get(key, int(secs * 1000) + 1)
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                return None
            return text

        found: str | None = _answer(get, secs + _MARGIN_SECS)
        return found


def _answer(call: Callable[[], Any], secs: float) -> Any:
    """Returns what a call of JAX returns, which can be waited for with an end, and interrupted."""
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer.set_exception(error)

    try:
        threading.Thread(target=ask, name="flax_partial_coordination", daemon=True).start()
    except RuntimeError:  # at the interpreter's exit no thread can be started
        ask()
    try:
        return answer.result(secs)
    except TimeoutError:
        raise _silence(secs) from None
    except JaxRuntimeError as error:
        raise _lost(f"does not answer ({error}).") from error


def _silence(secs: float) -> IncompleteCheckpointError:
    return _lost(f"has not answered for {secs:g} s.")


def _lost(what: str) -> IncompleteCheckpointError:
    return IncompleteCheckpointError(
        f"Process 0 may have died: JAX's coordination service, which runs there unless it was "
        f"started apart, {what} Nothing was lost: look whether the checkpoint is there, or start "
        "all processes anew."
    )


@contextmanager
def serving(address: str, processes: int) -> Iterator[None]:
    """Runs JAX's coordination service for as long as the context lasts.

    Args:
      address: Where it listens, as `host:port`.
      processes: How many connect to it.

    Raises:
      JaxRuntimeError: It cannot listen there.
    """
    service = _jax.get_distributed_runtime_service(
        address,
        processes,
        heartbeat_timeout=_HEARTBEAT_TIMEOUT_SECS,
        shutdown_timeout=_SHUTDOWN_TIMEOUT_SECS,
    )
    try:
        yield
    finally:
        service.shutdown()
