"""Requests that break: those that pass are repeated, those that do not end in one typed error."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from s3_server import Fault, S3Server, serving
from stores import another_process

import flax_partial as fp
from flax_partial.storage import object_store, store

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = np.random.default_rng(0).standard_normal(3 << 19).astype(np.float32)  # 6 MiB
STATE: dict[str, Any] = {"w": DATA, "b": np.ones(2000, np.float32), "step": 3}

REQUESTS = {
    "data": "POST .*uploads",
    "a piece": "PUT .*partNumber",
    "the upload's end": "POST .*uploadId",
    "a part's table": "PUT .*part.json",
    "a listing": "GET .*list-type",
    "a session's opening": "PUT .*open",
    "a fence": "PUT .*closing",
    "a verdict": "PUT .*verdict",
    "a root file": "PUT .*contents.json",
    "the mark": "PUT .*commit_success",
    "reading a table": "GET .*part.json",
    "reading the mark": "GET .*commit_success",
    "reading the contents": "GET .*contents.json",
    "reading data": "GET .*/data",
}
KINDS = ("503", "500", "429", "reset", "lost", "torn", "slow", "hang")


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
    """Each kind at each request takes minutes; each kind and each request is tried here."""
    return (list(REQUESTS).index(request) + KINDS.index(kind)) % 3 == 0


CASES = [(request, kind) for request in REQUESTS for kind in KINDS if is_sampled(request, kind)]


@pytest.mark.parametrize(("request_", "kind"), CASES)
def test_what_passes_is_repeated(server: S3Server, request_: str, kind: str) -> None:
    url = server.url()
    times = 1 if kind in ("hang", "slow") else 2
    secs = 0.8 if kind == "hang" else 0.05
    server.faults = [Fault(REQUESTS[request_], kind, times=times, secs=secs)]
    fp.save(url, STATE)
    another_process()
    fp.finalize(url)
    got = fp.load(url)
    assert (got["w"] == DATA).all()
    assert got["step"] == 3
    server.faults = []
    assert fp.verify(url).ok


@pytest.mark.parametrize("request_", ["data", "a part's table", "a listing", "the mark"])
def test_what_does_not_pass_ends_and_names_the_object(server: S3Server, request_: str) -> None:
    url = server.url()
    fp.store_options("s3://bucket", timeout_secs=0.3, retry_secs=0.2)
    fp.save(url, {"first": 1})
    server.faults = [Fault(REQUESTS[request_], "503", times=10**6)]
    begun = time.monotonic()

    def save_and_finalize() -> None:
        fp.save(url, STATE)
        fp.finalize(url)

    with pytest.raises(fp.StoreError, match=r"s3://bucket/.*: ") as caught:
        save_and_finalize()
    assert isinstance(caught.value, OSError)
    assert time.monotonic() - begun < 10
    server.faults = []
    another_process()
    fp.finalize(url)
    held = {"first"} | (set(STATE) if request_ == "the mark" else set())
    assert set(fp.load(url)) == held


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
