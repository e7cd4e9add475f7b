"""The matrix of faults: each kind of request to a store breaks in each way; what then has to hold.

The store is any S3; an `S3Server`, itself or as a proxy before another server, breaks requests.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from s3_server import Fault, S3Server
from stores import another_process

import flax_partial as fp

DATA = np.random.default_rng(0).standard_normal(3 << 19).astype(np.float32)  # 6 MiB: two pieces
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
    "looking at the mark": "HEAD .*commit_success",
    "deleting": r"(POST .*\?delete|DELETE )",
}
KINDS = ("503", "500", "429", "reset", "lost", "torn", "slow", "hang")
FOR_GOOD = 10**6


def check_repeated(
    server: S3Server, url: str, request: str, kind: str, *, hang_secs: float = 0.8
) -> None:
    """Asserts that a fault which passes is not noticed; a hang lasts longer than the time limit."""
    times = 1 if kind in ("hang", "slow") else 2
    secs = hang_secs if kind == "hang" else 0.05
    server.faults = [Fault(REQUESTS[request], kind, times=times, secs=secs)]
    try:
        fp.save(url, STATE)
        another_process()
        fp.finalize(url)
        got = fp.load(url)
        assert (got["w"] == DATA).all()
        assert got["step"] == 3
        fp.remove(url)
    finally:
        server.faults = []
    with contextlib.suppress(fp.NoSessionError):
        raise AssertionError(fp.load(url))


def check_told(
    server: S3Server, url: str, request: str, kind: str, *, hang_secs: float = 0.8
) -> str:
    """Asserts that a fault which lasts harms nothing but what it hits, and that this is told.

    Returns:
      The call that failed: `save`, `finalize` or `load`; empty if none did.
    """
    fp.save(url, {"first": 1})
    failed, said = "", ""
    server.faults = [Fault(REQUESTS[request], kind, times=FOR_GOOD, secs=hang_secs)]
    try:
        for name in ("save", "finalize", "load"):
            failed = name
            fp.save(url, STATE) if name == "save" else getattr(fp, name)(url)
            another_process()
        failed = ""
    except fp.StoreError as error:
        said = str(error)
    finally:
        server.faults = []
    assert not failed or url.partition("?")[0] in said, said
    another_process()
    with contextlib.suppress(fp.CheckpointExistsError):
        fp.finalize(url)
    saved = set() if failed == "save" else set(STATE)
    assert set(fp.load(url)) == {"first"} | saved, f"{failed} failed"
    assert fp.verify(url).ok
    return failed
