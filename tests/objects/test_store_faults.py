"""Requests that break: those that pass are repeated, those that do not end in one typed error."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from s3_server import S3Server, serving
from store_faults import KINDS, REQUESTS, STATE, check_repeated, check_told
from stores import another_process

import flax_partial as fp
from flax_partial.storage import object_store, store

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as found:
        fp.store_options("s3://bucket", timeout_secs=0.4, retry_secs=10.0)
        yield found
        fp.store_options("s3://bucket", timeout_secs=30.0, retry_secs=60.0)


@pytest.fixture(autouse=True)
def _small_pieces(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(object_store, "PIECE_BYTES", 5 << 20)  # the least that S3 takes
    another_process()
    yield
    server.faults = []


def is_sampled(request: str, kind: str) -> bool:
    """Each kind at each request takes minutes, in `long_runs/servers.py`; each of both is tried."""
    return (list(REQUESTS).index(request) + KINDS.index(kind)) % 4 == 0


CASES = [(request, kind) for request in REQUESTS for kind in KINDS if is_sampled(request, kind)]


@pytest.mark.parametrize(("request_", "kind"), CASES)
def test_what_passes_is_repeated(server: S3Server, request_: str, kind: str) -> None:
    check_repeated(server, server.url(), request_, kind)


@pytest.mark.parametrize(
    ("request_", "kind", "call"),
    [
        ("data", "503", "save"),
        ("a part's table", "lost", "save"),
        ("a listing", "torn", "save"),
        ("the mark", "reset", "finalize"),
        ("reading data", "hang", "load"),
    ],
)
def test_what_does_not_pass_ends_and_names_the_object(
    server: S3Server, request_: str, kind: str, call: str
) -> None:
    fp.store_options("s3://bucket", timeout_secs=0.3, retry_secs=0.2)
    begun = time.monotonic()
    assert check_told(server, server.url(), request_, kind) == call
    assert time.monotonic() - begun < 10
    assert issubclass(fp.StoreError, OSError)


def test_wrong_key_fails_at_once(server: S3Server) -> None:
    server.key = "another"
    try:
        begun = time.monotonic()
        with pytest.raises(fp.StoreAccessError, match=r"s3://bucket/"):
            fp.save(server.url(), STATE)
        assert time.monotonic() - begun < 5
    finally:
        server.key = "testkey"


def test_server_that_ignores_conditions_is_refused(server: S3Server) -> None:
    server.minds_conditions = False
    try:
        with pytest.raises(fp.StoreError, match="ignores 'If-None-Match"):
            fp.save(server.url(region="elsewhere"), STATE)
    finally:
        server.minds_conditions = True
    assert store.PIECE_BYTES == 16 << 20
