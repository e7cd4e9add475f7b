"""Real processes over HTTP: they race for one checkpoint, and are killed; see `servers.py`."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator

import pytest
import servers
from s3_server import S3Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as found:
        yield found


def test_what_real_processes_that_race_are_told_holds(server: S3Server) -> None:
    places = iter(server.url, None)
    held = servers.races(places, processes=4, secs=2.0, seed=0)
    assert {call.kind for calls in held for call in calls} >= {"save", "finalize", "load"}


def test_real_processes_that_are_killed_are_followed_by_others_that_go_on(
    server: S3Server,
) -> None:
    ledger, after = servers.kills(server.url(), count=4, seed=0)
    assert after.total() == 4
    assert ledger.step > 1


def test_they_race_on_a_server_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """By moto; it may be missing, but not where `SERVERS=moto` says that it is there."""
    if os.environ.get("SERVERS") != "moto":
        pytest.importorskip("moto.server")
    from moto.moto_server import werkzeug_app
    from werkzeug.serving import make_server

    # One request at a time: moto looks whether an object is there, and then puts it.
    app = werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app)
    handler = werkzeug_app.MotoRequestHandler
    with make_server("127.0.0.1", 0, app, threaded=False, request_handler=handler) as moto:
        serving = threading.Thread(target=moto.serve_forever)
        serving.start()
        try:
            endpoint = f"http://127.0.0.1:{moto.port}"
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            servers.make_bucket("moto")
            places = (f"s3://moto/{uuid.uuid4().hex}?endpoint={endpoint}" for _ in range(999))
            servers.races(places, processes=4, secs=1.5, seed=0)
        finally:
            moto.shutdown()
            serving.join()
