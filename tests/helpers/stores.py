"""Object stores for tests: fresh places in them, and requests that are counted, or kill."""

from __future__ import annotations

import contextlib
import functools
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flax_partial.sessions import registry
from flax_partial.storage.object_store import ObjectStore

METHODS = (
    *("get", "get_into", "put", "put_new", "require_conditions"),
    *("list", "children", "size", "delete"),
)
Request = Callable[[], Any]


def memory(path: str = "/run/12") -> str:
    """A fresh place in memory."""
    return f"memory://{uuid.uuid4().hex}{path}"


def another_process() -> None:
    """Drops this process's records of sessions, as if it had just begun."""
    registry._forget_all()  # noqa: SLF001 - no caller can do this


class Killed(BaseException):
    """The process is gone."""


@contextlib.contextmanager
def requests_through(hook: Callable[[str, tuple[Any, ...], Request], Any]) -> Iterator[None]:
    """Has each request of a store made by `hook(method, arguments, request)`."""
    real = {name: getattr(ObjectStore, name) for name in METHODS}

    def through(name: str) -> Any:
        @functools.wraps(real[name])
        def call(store: ObjectStore, *arguments: Any, **how: Any) -> Any:
            return hook(name, (store, *arguments), lambda: real[name](store, *arguments, **how))

        return call

    try:
        for name in METHODS:
            setattr(ObjectStore, name, through(name))
        yield
    finally:
        for name in METHODS:
            setattr(ObjectStore, name, real[name])


class Death:
    """Kills at one request: before it is carried out, or after; a deletion of many half way."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at, self.after = at, after
        self.made = 0
        self.is_dead = False
        self._lock = threading.Lock()

    def __call__(self, name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        with self._lock:
            if self.is_dead:
                raise Killed
            self.made += 1
            self.is_dead = self.made == self.at
            is_it = self.is_dead
        if not is_it:
            return request()
        if self.after and name == "delete":
            store, keys = arguments
            for key in keys[: (len(keys) + 1) // 2]:
                store._client and _delete_one(store, key)  # noqa: SLF001
        elif self.after:
            request()
        raise Killed


def _delete_one(store: ObjectStore, key: str) -> None:
    from obstore import delete

    with contextlib.suppress(FileNotFoundError):
        delete(store._client, store._prefix + key)  # noqa: SLF001
