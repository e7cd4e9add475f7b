"""A small S3 on loopback, in memory: counts requests, and breaks those that it is told to.

It answers what Amazon's answers, as far as checkpoints ask: objects, ranges, listings, conditions,
uploads in pieces, deletion of many. It checks the name of a key, and no signature. Before another
server, as a proxy, it passes on what it does not break.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape, unescape

if TYPE_CHECKING:
    from collections.abc import Iterator

DATE = "Thu, 26 Nov 2026 00:00:00 GMT"
CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    416: "InvalidRange",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass
class Fault:
    """What is to break.

    Attributes:
      match: A pattern for "METHOD path?query".
      kind: A status; or `reset` (before it is carried out), `lost` (after), `torn` (half of the
        answer's body), `slow`, `hang` (for `secs`, and then a reset).
      times: How often.
      skip: How many that match pass before.
    """

    match: str
    kind: str
    times: int = 1
    skip: int = 0
    secs: float = 0.5


class S3Server(ThreadingHTTPServer):
    """The server; its attributes may be read and set at any time.

    Attributes:
      objects: Content by bucket/key.
      counts: Requests by what they do, such as `GET` and `LIST`.
      most: Most requests that were in flight at once.
      faults: What is to break.
      latency: Seconds that each request takes.
      minds_conditions: Whether `If-None-Match` is honoured.
      log: "METHOD path?query" of each request.
      upstream: Host and port of the server that answers; empty where this one does.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Proxy if upstream else _Handler)
        self.upstream = upstream
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.counts: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.latency = 0.0
        self.minds_conditions = True
        self.key = "testkey"
        self.now = self.most = 0
        self.log: list[str] = []
        self.most_keys = 1000

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def url(self, path: str = "", **parameters: str) -> str:
        """A fresh place in it."""
        query = "".join(f"&{name}={value}" for name, value in parameters.items())
        return f"s3://bucket/{uuid.uuid4().hex[:8]}{path}?endpoint={self.endpoint}{query}"

    def reset(self) -> None:
        self.counts.clear()
        self.log.clear()
        self.most = 0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def fault_of(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.match, line):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serving(upstream: str = "") -> Iterator[S3Server]:
    with S3Server(upstream) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: S3Server

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _request(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.key = unquote(path).lstrip("/")
        bucket, _, inner = self.key.partition("/")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {path}?{query}"
        server = self.server
        fault = server.fault_of(line)  # before the log shows that the request is here
        with server.lock:
            server.counts[self._kind(inner)] += 1
            server.log.append(line)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.latency)
            self.is_torn, self.is_lost = False, False
            if fault is not None and not self._broken(fault):
                return
            self._carry_out(bucket, inner)
        finally:
            with server.lock:
                server.now -= 1

    def _carry_out(self, bucket: str, inner: str) -> None:
        if f"Credential={self.server.key}/" not in self.headers.get("Authorization", ""):
            self._error(403)
        elif inner:
            getattr(self, f"_{self._kind(inner).lower()}")()
        elif self.command == "GET":
            self._list(bucket)
        else:
            self._delete_many(bucket)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _request  # noqa: N815

    def _kind(self, inner: str) -> str:
        if not inner:
            return "LIST" if self.command == "GET" else "DELETE_MANY"
        if self.command == "POST":
            return "BEGIN" if "uploads" in self.query else "END"
        if self.command == "PUT":
            return "PIECE" if "partNumber" in self.query else "PUT"
        return "ABORT" if "uploadId" in self.query else self.command

    def _broken(self, fault: Fault) -> bool:
        """Breaks a request; returns whether it goes on all the same."""
        if fault.kind.isdecimal():
            self._error(int(fault.kind))
            return False
        if fault.kind in ("slow", "hang"):
            time.sleep(fault.secs)
        if fault.kind in ("reset", "hang"):
            self._cut()
            return False
        self.is_torn, self.is_lost = fault.kind == "torn", fault.kind == "lost"
        return True

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.is_lost:
            self._cut()
            return
        self.send_response(status)
        shown = {"Last-Modified": DATE, "Content-Length": str(len(body))}
        shown |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        for name, value in shown.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.is_torn:
            self.wfile.write(body[: len(body) // 2])
            self._cut()
            return
        self.wfile.write(body)

    def _error(self, status: int) -> None:
        self.is_torn = self.is_lost = False
        text = f"<Error><Code>{CODES[status]}</Code><Message>told to</Message></Error>"
        self._answer(status, text.encode(), Content_Type="application/xml")

    def _xml(self, text: str) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
        self._answer(200, body, Content_Type="application/xml")

    def _put(self) -> None:
        with self.server.lock:
            is_new = self.headers.get("If-None-Match") == "*" and self.server.minds_conditions
            is_there = is_new and self.key in self.server.objects
            if not is_there:
                self.server.objects[self.key] = self.body
        self._error(412) if is_there else self._answer(200, ETag='"e"')

    def _get(self) -> None:
        data = self.server.objects.get(self.key)
        if data is None:
            self._error(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data, ETag='"e"')
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            self._error(416)
            return
        content_range = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], ETag='"e"', Content_Range=content_range)

    def _head(self) -> None:
        data = self.server.objects.get(self.key)
        if data is None:
            self._error(404)
        else:
            self._answer(200, b"", ETag='"e"', Content_Length=str(len(data)))

    def _delete(self) -> None:
        with self.server.lock:
            self.server.objects.pop(self.key, None)
        self._answer(204)

    def _begin(self) -> None:
        upload = uuid.uuid4().hex
        self.server.uploads[upload] = {}
        self._xml(
            "<InitiateMultipartUploadResult><Bucket>bucket</Bucket>"
            f"<Key>{escape(self.key.partition('/')[2])}</Key><UploadId>{upload}</UploadId>"
            "</InitiateMultipartUploadResult>"
        )

    def _piece(self) -> None:
        pieces = self.server.uploads.get(self.query["uploadId"])
        if pieces is None:
            self._error(404)
            return
        pieces[int(self.query["partNumber"])] = self.body
        self._answer(200, ETag=f'"{self.query["partNumber"]}"')

    def _end(self) -> None:
        pieces = self.server.uploads.pop(self.query["uploadId"], None)
        if pieces is None:
            self._error(404)
            return
        with self.server.lock:
            self.server.objects[self.key] = b"".join(pieces[one] for one in sorted(pieces))
        self._xml(
            "<CompleteMultipartUploadResult><Bucket>bucket</Bucket>"
            f'<Key>{escape(self.key)}</Key><ETag>"e"</ETag></CompleteMultipartUploadResult>'
        )

    def _abort(self) -> None:
        self.server.uploads.pop(self.query["uploadId"], None)
        self._answer(204)

    def _delete_many(self, bucket: str) -> None:
        keys = [unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", self.body.decode())]
        with self.server.lock:
            for key in keys:
                self.server.objects.pop(f"{bucket}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._xml(f"<DeleteResult>{deleted}</DeleteResult>")

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        after = self.query.get("continuation-token", self.query.get("start-after", ""))
        with self.server.lock:
            start = f"{bucket}/{prefix}"
            found = [
                (name.removeprefix(f"{bucket}/"), len(data))
                for name, data in self.server.objects.items()
                if name.startswith(start)
            ]
        shown: dict[str, int | None] = {}
        for key, size in sorted(found):
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            name = key if end < 0 else key[: end + 1]
            if name > after and not (end >= 0 and name <= after):
                shown.setdefault(name, None if end >= 0 else size)
        names = list(shown)[: self.server.most_keys]
        is_cut = len(shown) > len(names)
        parts = [f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>{str(is_cut).lower()}"]
        parts.append("</IsTruncated>")
        if is_cut:
            parts.append(f"<NextContinuationToken>{escape(names[-1])}</NextContinuationToken>")
        is_quoted = self.query.get("encoding-type") == "url"
        for name in names:
            said = quote(name, safe="/") if is_quoted else escape(name)
            if shown[name] is None:
                parts.append(f"<CommonPrefixes><Prefix>{said}</Prefix></CommonPrefixes>")
            else:
                parts.append(
                    f"<Contents><Key>{said}</Key><Size>{shown[name]}</Size><ETag>e</ETag>"
                    "<LastModified>2026-11-26T00:00:00.000Z</LastModified></Contents>"
                )
        self._xml("".join(parts) + "</ListBucketResult>")


class _Proxy(_Handler):
    """Passes requests on as they are: `Host` too, so that signatures hold."""

    _OWN = ("connection", "date", "keep-alive", "server", "transfer-encoding")

    def _carry_out(self, _bucket: str, _inner: str) -> None:
        connection = HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, self.body, dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        kept = {n: value for n, value in answer.getheaders() if n.lower() not in self._OWN}
        self._answer(answer.status, body, **kept)
