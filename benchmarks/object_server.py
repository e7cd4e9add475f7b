"""Servers on loopback for the scenario `object_store`, each in a process of its own.

One is the small S3 of the tests, in memory; the same program stands before fake-gcs-server, with
which Orbax is measured. It waits before it answers, and counts requests.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

_HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"


class Server:
    """A server that runs.

    Attributes:
      endpoint: Its address, as an http URL.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.endpoint: str = pipe.recv()

    def counts(self) -> Counter[str]:
        """Returns how many requests of each kind there were since this was last asked."""
        self._pipe.send(None)
        counts: Counter[str] = self._pipe.recv()
        return counts


@contextmanager
def serving(latency_secs: float, upstream: str = "") -> Iterator[Server]:
    """Runs a server until the context ends.

    Args:
      latency_secs: How long each request takes.
      upstream: Host and port of the server that it passes requests on to; empty for a small S3.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, latency_secs, upstream), daemon=True)
    process.start()
    try:
        yield Server(ours)
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, latency_secs: float, upstream: str) -> None:
    sys.path.insert(0, str(_HELPERS))
    server = importlib.import_module("s3_server").S3Server(upstream)
    server.latency = latency_secs
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.endpoint)
    with contextlib.suppress(EOFError):  # the other process has ended
        while True:
            pipe.recv()
            pipe.send(server.counts)
            server.counts.clear()
