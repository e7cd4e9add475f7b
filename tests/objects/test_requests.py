"""How many requests calls make, and how many of them at once: they cost time, and money."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from s3_server import S3Server, serving
from stores import another_process, requests_through

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stores import Request

MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as found:
        yield found


def requests_of(server: S3Server, call: Callable[[], Any]) -> int:
    server.reset()
    call()
    return server.total


def small(name: str, leaves: int) -> dict[str, Any]:
    return {name: {str(at): np.full(3, at, np.float32) for at in range(leaves)}}


def group(at: int, size: int = 16 << 10) -> dict[str, Any]:
    return {f"layer{at}": {"w": np.full(size, at, np.float32), "b": np.ones(4, np.float32)}}


def test_first_save_of_a_process(server: S3Server) -> None:
    for state in (small("a", 100), {"m": {"w": np.ones(16384)}}):
        another_process()

        path = server.url(region=f"of{uuid.uuid4().hex}")
        assert requests_of(server, lambda: fp.save(path, state)) <= 8  # noqa: B023


@pytest.mark.parametrize("leaves", [1, 512])
def test_later_saves_of_small_leaves(server: S3Server, leaves: int) -> None:
    path = server.url()
    fp.save(path, {"first": 1})
    assert requests_of(server, lambda: fp.save(path, small("a", leaves))) == 2
    assert requests_of(server, lambda: fp.save(path, {"m": {"w": np.ones(16384)}})) == 3


@pytest.mark.parametrize("parts", [1, 32, 256])
def test_finalize_and_loading_one_of_its_groups(server: S3Server, parts: int) -> None:
    path = server.url()
    for at in range(parts):
        fp.save(path, group(at))
    another_process()
    keys = len(server.objects)
    assert requests_of(server, lambda: fp.finalize(path)) <= parts + 26 + 4 * keys // 1000
    assert requests_of(server, lambda: fp.metadata(path)) == 2
    last = group(parts - 1)
    assert requests_of(server, lambda: fp.load(path, last, partial=True)) <= 6
    assert requests_of(server, lambda: fp.remove(path)) <= 6


def test_large_leaves_go_and_come_in_large_pieces_and_not_too_many_at_once(
    server: S3Server,
) -> None:
    path = server.url()
    fp.save(path, {"first": 1})
    data = np.arange(80 * MIB // 4, dtype=np.float32)
    assert requests_of(server, lambda: fp.save(path, {"w": data})) <= 2 + 2 + 5
    assert server.most <= 32
    fp.finalize(path)
    got: dict[str, Any] = {}
    loading = requests_of(server, lambda: got.update(fp.load(path, {"w": data}, partial=True)))
    assert loading <= 6 + 80 // 8
    assert server.most <= 32
    assert (got["w"] == data).all()


def test_data_are_sent_from_where_the_arrays_are(server: S3Server) -> None:
    data = np.arange(1 << 20, dtype=np.float32)
    sent: list[Any] = []

    def hook(name: str, arguments: tuple[Any, ...], request: Request) -> Any:
        if name == "put" and arguments[1].endswith("/data"):
            sent.extend(np.frombuffer(piece, np.uint8) for piece in arguments[2])
        return request()

    with requests_through(hook):
        fp.save(server.url(), {"w": data})
    assert sum(piece.nbytes for piece in sent) == data.nbytes
    assert all(np.shares_memory(piece, data) for piece in sent)


SAVED_BYTES = 256 * MIB
SAVER = """
import re, sys
import numpy as np
import flax_partial as fp

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

url, size = sys.argv[1], int(sys.argv[2])
fp.save(url, {"first": np.ones(1 << 20, np.uint8)})
data = np.ones(size, np.uint8)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
fp.save(url, {"w": data})
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory to reset")
def test_saving_a_large_array_adds_little_memory(server: S3Server) -> None:
    path = server.url()
    command = [sys.executable, "-c", SAVER, path, str(SAVED_BYTES)]
    added = int(subprocess.run(command, check=True, capture_output=True).stdout)
    held = sum(map(len, server.objects.values()))
    server.objects.clear()
    assert held > SAVED_BYTES
    assert added < 64 * MIB, f"{added / MIB:.0f} MiB"
