"""Real processes over HTTP: they race for one checkpoint, and are killed; see `servers.py`."""

from __future__ import annotations

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
