"""Object stores behind `Store`: S3, Google Cloud Storage, Azure, and one in memory, by obstore.

The one module that speaks obstore, which the extra `objects` installs. What obstore leaves open is
closed here: it does not repeat a conditional put, a listing, or the beginning of an upload whose
answer was lost or torn; it takes a lost answer to "create" for "exists", and one to the end of an
upload for "not found"; after a fork it waits forever; and Ctrl-C waits for its requests.
"""

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from flax_partial.errors import (
    ForkedProcessError,
    StoreAccessError,
    StoreError,
    how_to_install,
)
from flax_partial.storage.paths import without_secrets
from flax_partial.storage.store import MOST_REQUESTS, PIECE_BYTES, Entry, cut
from flax_partial.storage.urls import HIDDEN, Url, is_secret

T = TypeVar("T")

_PREFIX = re.compile("^(aws|google|azure(_storage)?)_")
_SAME = {
    "endpoint_url": "endpoint",
    "endpoint_url_s3": "endpoint",
    "service_account_path": "service_account",
}
_CONDITIONS = {"gs": "x-goog-if-generation-match: 0"}  # the others: If-None-Match
_AWS_CREDENTIALS = (
    "access_key_id",
    "container_credentials_full_uri",
    "container_credentials_relative_uri",
    "skip_signature",
    "web_identity_token_file",
)
_GOOGLE_CREDENTIALS = (
    "application_credentials",
    "bearer_token",
    "service_account",
    "service_account_key",
    "skip_signature",
)
_GOOGLE_VARIABLES = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SKIP_SIGNATURE",
)
# Writes are signed whatever `skip_signature` says, unless an account's file says not to.
_NOBODY = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
_HOW_TO_GIVE = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or pass access_key_id and "
    "secret_access_key to flax_partial.store_options; those in ~/.aws are found where boto3 is "
    "installed.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS, pass service_account to flax_partial.store_options, "
    "or log in by 'gcloud auth application-default login'.",
}
_REFUSED = re.compile(r"\b(401 Unauthorized|403 Forbidden)\b")  # of a listing it is a generic error
_MOST_OF_ONE = 16  # requests of one upload
_ATTEMPTS = 3  # at what obstore does not repeat itself
_PAUSE_SECS = 0.05
_METADATA_SECS = 1.0
_LISTED_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class _Options:
    timeout_secs: float = 30.0
    retry_secs: float = 60.0
    client: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets


_options: dict[str, _Options] = {"": _Options()}
_lock = threading.Lock()
_clients: dict[object, Any] = {}
_memories: dict[str, Any] = {}
_honour_conditions: list[Any] = []  # clients of servers that were tried


def store_options(
    url: str = "",
    /,
    *,
    timeout_secs: float | None = None,
    retry_secs: float | None = None,
    **client: str,
) -> None:
    """Sets how object stores are reached by this process, from now on.

    Args:
      url: Those whose URL begins with this; all of them by default. The longest that fits counts;
        what it does not set is as for shorter ones.
      timeout_secs: For how many seconds one request may take, 30 by default. A piece of an upload
        is of 16 MiB.
      retry_secs: For how many seconds a request that fails in passing is repeated, 60 by default.
      **client: What obstore takes for a store of that kind: `endpoint`, `region`, `access_key_id`,
        `secret_access_key`, `session_token`, `skip_signature` and more for S3, `base_url`,
        `service_account`, `bearer_token` for Google's, `account_name`, `account_key` for Azure's.
        Parameters in a URL (`s3://bucket/run?endpoint=...&region=...`) count more than these, and
        the environment (`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`) less.

    Raises:
      ValueError: A number of seconds is not above 0.
    """
    for name, secs in (("timeout_secs", timeout_secs), ("retry_secs", retry_secs)):
        if secs is not None and not secs > 0:
            raise ValueError(f"{name} is a number of seconds above 0, not {secs!r}")
    with _lock:
        before = _options_of(url)
        _options[url] = _Options(
            before.timeout_secs if timeout_secs is None else timeout_secs,
            before.retry_secs if retry_secs is None else retry_secs,
            {**before.client, **_plain(client)},
        )


def _plain(client: Mapping[str, str]) -> dict[str, str]:
    """Returns options by the shortest of the names by which obstore takes each."""
    plain = {_PREFIX.sub("", name.lower()): value for name, value in client.items()}
    return {_SAME.get(name, name): value for name, value in plain.items()}


def _options_of(url: str) -> _Options:
    return _options[max((start for start in _options if url.startswith(start)), key=len)]


def open_store(url: Url) -> "ObjectStore":
    """Returns the store whose root is at a URL; no request is sent.

    Raises:
      ImportError: obstore is not installed.
      StoreAccessError: There are no credentials for it.
      ValueError: A parameter, or an option, is not one of its kind of store.
    """
    options = _options_of(str(url._replace(query="")))
    parameters = _plain(dict(parse_qsl(url.query, keep_blank_values=True)))
    options = replace(options, client={**options.client, **parameters})
    known = (url.scheme, url.bucket, json.dumps([options.timeout_secs, options.retry_secs]))
    identity = (*known, tuple(sorted(options.client.items())), os.getpid())
    with _lock:
        if identity not in _clients:
            _clients[identity] = _connect(url, options)
        client = _clients[identity]
    return ObjectStore(client, url._replace(query=""), retry_secs=options.retry_secs)


def _connect(url: Url, options: _Options) -> Any:
    try:
        import obstore.store
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise ImportError(
            f"{url} is in an object store, which needs obstore: {how_to_install('objects')}."
        ) from error
    if url.scheme == "memory":
        return _memories.setdefault(url.bucket, obstore.store.MemoryStore())
    config: Any = dict(options.client)
    common: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=options.timeout_secs),
            "connect_timeout": timedelta(seconds=min(5.0, options.timeout_secs)),
            "pool_max_idle_per_host": str(2 * MOST_REQUESTS),
        },
        "retry_config": {
            "max_retries": 10,
            "retry_timeout": timedelta(seconds=options.retry_secs),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        },
    }
    if _endpoint(url, config).startswith("http:"):
        common["client_options"]["allow_http"] = True
    try:
        if url.scheme == "s3":
            return _s3(url, config, common)
        if url.scheme == "gs":
            if "endpoint" in config:
                endpoint = config.pop("endpoint")
                if _has_google_credentials(config):
                    config["base_url"] = endpoint
                else:
                    config["service_account_key"] = json.dumps(_NOBODY | {"gcs_base_url": endpoint})
            elif not _has_google_credentials(config):
                place = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
                _require_metadata_server(url, place)
            return obstore.store.GCSStore(url.bucket, config=config, **common)
        return obstore.store.AzureStore(url.bucket, config=config, **common)
    except BaseError as error:
        raise ValueError(f"{url}: {_said(error, options.client)}") from None


def _endpoint(url: Url, config: Mapping[str, str]) -> str:
    """Where the servers are; empty for those of the cloud."""
    given = [config[name] for name in ("endpoint", "base_url") if name in config]
    place = given[0] if given else _endpoint_of_environment(url.scheme)
    if (given or place) and not place.startswith(("http://", "https://")):  # obstore panics
        shown = place.rpartition("@")[2].partition("?")[0]
        raise ValueError(f"{url}: its endpoint {shown!r} has to begin with http:// or https://")
    return place


def _endpoint_of_environment(scheme: str) -> str:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT") if scheme == "s3" else ()
    return next((found for name in names if (found := os.environ.get(name))), "")


def _s3(url: Url, config: Any, common: Mapping[str, Any]) -> Any:
    from obstore.store import S3Store

    if "endpoint" not in config and not _endpoint_of_environment("s3"):
        config.setdefault("virtual_hosted_style_request", "true")
    if not _has_aws_credentials(config):
        with contextlib.suppress(ImportError):
            from boto3 import Session
            from obstore.auth.boto3 import Boto3CredentialProvider

            session = Session()
            if session.get_credentials() is not None:
                config.setdefault("region", session.region_name or "us-east-1")
                provider = Boto3CredentialProvider(session)
                return S3Store(url.bucket, config=config, credential_provider=provider, **common)
        place = config.get("metadata_endpoint") or os.environ.get("AWS_METADATA_ENDPOINT")
        _require_metadata_server(url, place or "169.254.169.254")
    return S3Store(url.bucket, config=config, **common)


def _has_aws_credentials(config: Mapping[str, str]) -> bool:
    return any(name in config or os.environ.get(f"AWS_{name.upper()}") for name in _AWS_CREDENTIALS)


def _has_google_credentials(config: Mapping[str, str]) -> bool:
    return (
        any(name in config for name in _GOOGLE_CREDENTIALS)
        or any(os.environ.get(name) for name in _GOOGLE_VARIABLES)
        or Path("~/.config/gcloud/application_default_credentials.json").expanduser().exists()
    )


def _require_metadata_server(url: Url, place: str) -> None:
    """Raises StoreAccessError if no server of the cloud's gives this machine credentials."""
    host, _, port = place.rpartition("//")[2].rstrip("/").partition(":")
    try:
        socket.create_connection((host, int(port or 80)), _METADATA_SECS).close()
    except OSError:
        raise StoreAccessError(
            f"{url}: there are no credentials. {_HOW_TO_GIVE[url.scheme]} skip_signature='true', "
            "an option or a parameter of the URL, asks without any."
        ) from None


class _Slots:
    """Bounds how many requests are in flight, in all of this process."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, most: int = 1) -> Iterator[int]:
        """Waits for one; takes up to `most` of what is free then. Yields how many."""
        with self._changed:
            while not self._free:
                self._changed.wait()
            taken = min(most, self._free)
            self._free -= taken
        try:
            yield taken
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify(taken)


_slots = _Slots(MOST_REQUESTS)


class ObjectStore:
    """Objects below a prefix in one bucket; see `Store` for the methods."""

    def __init__(self, client: Any, root: Url, *, retry_secs: float) -> None:
        self._client = client
        self._root = root
        self._prefix = f"{root.key}/" if root.key else ""
        self._retry_secs = retry_secs
        self._process = os.getpid()
        self.url = str(root)

    def below(self, prefix: str) -> "ObjectStore":
        """Returns the store whose root is `prefix`."""
        root = self._root._replace(key=self._prefix + prefix)
        return ObjectStore(self._client, root, retry_secs=self._retry_secs)

    def get(self, key: str) -> bytes | None:
        """Returns an object; None where there is none."""
        from obstore import get

        def once() -> bytes:
            return bytes(get(self._client, self._prefix + key).bytes())

        return self._or_none(key, once)

    def get_into(self, key: str, offset: int, into: memoryview) -> None:
        """Reads bytes of an object."""
        from obstore import get_range

        def once() -> None:
            found = get_range(self._client, self._prefix + key, start=offset, length=len(into))
            if len(found) != len(into):
                raise ValueError(f"{self._name(key)} ends before {offset + len(into)} bytes")
            into[:] = memoryview(found)

        if into:
            self._do(key, once)

    def put(
        self,
        key: str,
        pieces: Iterable[bytes | memoryview],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Writes an object, in pieces of 16 MiB that are sent side by side."""
        from obstore import head, put

        views = list(cut(pieces, PIECE_BYTES))
        size = sum(map(len, views))

        def small() -> None:
            check()
            put(self._client, self._prefix + key, b"".join(views), use_multipart=False)

        def large() -> None:
            try:
                put(
                    self._client,
                    self._prefix + key,
                    _checked(views, check),
                    chunk_size=PIECE_BYTES,
                    max_concurrency=slots[0],
                )
            except FileNotFoundError:  # the upload is gone: it ended, and the answer was lost
                if head(self._client, self._prefix + key)["size"] != size:
                    raise

        if size <= PIECE_BYTES:
            self._do(key, small)
            return
        slots = [1]
        with _slots.take(min(_MOST_OF_ONE, -(-size // PIECE_BYTES))) as slots[0]:
            self._do(key, large, slots=0)

    def put_new(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none; returns whether `data` is what is there now.

        Whatever was the answer, what is there is looked at: the request may have been carried out.
        """
        failure: OSError | None = None
        for attempt in range(_ATTEMPTS):
            try:
                if self._do(key, partial(self._create, key, data), attempts=1):
                    return True
            except StoreAccessError:
                raise
            except StoreError as error:
                failure = error
            found = self.get(key)
            if found is not None:
                return found == data
            time.sleep(_PAUSE_SECS * 2**attempt)
        raise failure or StoreError(f"{self._name(key)}: puts of others are in conflict with it")

    def _create(self, key: str, data: bytes) -> bool:
        """Puts an object; returns False where the server says that there is one."""
        from obstore import put
        from obstore.exceptions import AlreadyExistsError

        try:
            put(self._client, self._prefix + key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def require_conditions(self, key: str) -> None:
        """Finds out a server that ignores conditions: it replaces what is there."""
        if self._client in _honour_conditions:
            return
        if self._do(key, partial(self._create, key, b"{}")):
            self.delete([key])
            condition = _CONDITIONS.get(self._root.scheme, "If-None-Match: *")
            raise StoreError(
                f"{self.url}: the server ignores {condition!r}, by which an object is put only if "
                "there is none. Without that nothing can be committed safely: use a server that "
                "honours it."
            )
        _honour_conditions.append(self._client)

    def list(self, prefix: str = "") -> Sequence[Entry]:
        """Returns all objects below a prefix."""
        from obstore import list as listing

        def once() -> Sequence[Entry]:
            batches = listing(self._client, self._prefix + prefix, chunk_size=_LISTED_AT_ONCE)
            return [self._entry(one) for batch in batches for one in batch]

        return self._do(prefix, once)

    def children(self, prefix: str = "") -> tuple[Sequence[str], Sequence[Entry]]:
        """Returns one level below a prefix."""
        from obstore import list_with_delimiter

        def once() -> tuple[Sequence[str], Sequence[Entry]]:
            found = list_with_delimiter(self._client, self._prefix + prefix)
            names = [one.rstrip("/").rpartition("/")[2] for one in found["common_prefixes"]]
            return names, [self._entry(one) for one in found["objects"]]

        return self._do(prefix, once)

    def _entry(self, found: Mapping[str, Any]) -> Entry:
        return Entry(found["path"][len(self._prefix) :], found["size"])

    def size(self, key: str) -> int | None:
        """Returns the size of an object, in bytes; None where there is none."""
        from obstore import head

        return self._or_none(key, lambda: int(head(self._client, self._prefix + key)["size"]))

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects."""
        from obstore import delete

        paths = [self._prefix + key for key in keys]

        def once() -> None:
            try:
                delete(self._client, paths)
            except FileNotFoundError:  # some stores delete one by one, and fail at this
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):
                        delete(self._client, path)

        if paths:
            self._do(keys[0], once)

    def _or_none(self, key: str, once: Callable[[], T]) -> T | None:
        try:
            return self._do(key, once)
        except FileNotFoundError:
            return None

    def _do(
        self, key: str, once: Callable[[], T], *, attempts: int = _ATTEMPTS, slots: int = 1
    ) -> T:
        """Does a request; repeats it after passing failures, and translates errors into ours."""
        if os.getpid() != self._process:
            raise ForkedProcessError(
                f"{self._name(key)}: object stores cannot be used in a forked child. Start it with "
                "the 'spawn' or 'forkserver' method of multiprocessing."
            )

        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        def guarded() -> T:
            with _slots.take() if slots else contextlib.nullcontext():
                return once()

        deadline = time.monotonic() + self._retry_secs
        for attempt in range(attempts):
            try:
                return _uninterrupted(guarded)
            except FileNotFoundError:
                raise FileNotFoundError(
                    errno.ENOENT, "There is no such object, or no such bucket", self._name(key)
                ) from None
            except BaseError as error:
                said = _said(error)
                is_refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
                if is_refused or _REFUSED.search(said):
                    raise StoreAccessError(f"{self._name(key)}: {said}") from None
                failure = StoreError(f"{self._name(key)}: {said}")
                is_last = attempt + 1 == attempts or time.monotonic() > deadline
                if is_last:
                    raise failure from None
            time.sleep(_PAUSE_SECS * 2**attempt)
        raise AssertionError

    def _name(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url


def _said(error: Exception, client: Mapping[str, str] | None = None) -> str:
    """What an error says, without secrets, those among the options of a client included."""
    said = str(error).split("Debug source")[0]
    for name, value in (client or {}).items():
        if value and is_secret(name, value):
            said = said.replace(value, HIDDEN)
    return without_secrets(" ".join(said.split()))


def _checked(views: Iterable[memoryview], check: Callable[[], None]) -> Iterator[memoryview]:
    for view in views:
        check()
        yield view


def _uninterrupted(request: Callable[[], T]) -> T:
    """Makes a request; in the main thread by another one, so that Ctrl-C need not wait for it."""
    if threading.current_thread() is not threading.main_thread():
        return request()
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(request())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            done.set_exception(error)

    try:
        threading.Thread(target=run, name="store-request", daemon=True).start()
    except RuntimeError:  # the system, or an interpreter that is ending, starts none
        return request()
    return done.result()


def _forget_lock() -> None:
    """In a forked child nothing would give back what a thread of the parent held."""
    global _lock, _slots
    _lock, _slots = threading.Lock(), _Slots(MOST_REQUESTS)


os.register_at_fork(after_in_child=_forget_lock)
