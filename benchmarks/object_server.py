"""Servers on loopback for the scenario `object_store`, each in a process of its own.

`python -m benchmarks.object_server s3 LATENCY_SECS` is a small S3 in memory, that of the tests;
`gcs` stands before fake-gcs-server, with which Orbax is measured, and delays what passes. Both
print their address, and then for each line that they read how many requests there were since.
"""

from __future__ import annotations

import http.client
import importlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

_HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length", "expect"))


class Server:
    """A server of this module that runs.

    Attributes:
      endpoint: Its address, as an http URL.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.endpoint = self._line()

    def counts(self) -> Counter[str]:
        """Returns how many requests of each kind there were since this was last asked."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Counter(json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def serving(kind: str, latency_secs: float, *arguments: str) -> Iterator[Server]:
    """Runs a server until the context ends."""
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", "benchmarks.object_server", kind, str(latency_secs), *arguments],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    target = ""
    latency_secs = 0.0
    counts: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            self.counts["GET" if self.command in ("GET", "HEAD") else "PUT"] += 1
        time.sleep(self.latency_secs)
        kept = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc)
        connection.request(self.command, self.path, body, kept)
        answer = connection.getresponse()
        data = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        is_head = self.command == "HEAD"
        length = answer.getheader("Content-Length") if is_head else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(b"" if is_head else data)
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on  # noqa: N815


def main() -> None:
    """Runs the server that the command line names."""
    kind, latency, *rest = sys.argv[1:]
    server: Any
    if kind == "s3":
        sys.path.insert(0, str(_HELPERS))
        server = importlib.import_module("s3_server").S3Server()
        server.latency, counts = float(latency), server.counts
    else:
        _Proxy.target, _Proxy.latency_secs, counts = rest[0], float(latency), _Proxy.counts
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
        server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(counts), flush=True)
        counts.clear()


if __name__ == "__main__":
    main()
