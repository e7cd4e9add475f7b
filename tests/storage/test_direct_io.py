"""What is appended is in the file at the offset that was told, however the kernel took it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from things import files_of_at_most

from flax_partial.storage import direct_io
from flax_partial.storage.direct_io import NewFile

MEMORY = np.random.default_rng(0).integers(0, 256, 6 << 20, np.uint8)
SIZES = (0, 1, 100, 4095, 4096, 4097, 65_535, 65_536, 65_537, 300_000, 1 << 20, (1 << 20) + 1)

runs = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(SIZES)), max_size=12)


def write(path: Path, wanted: Sequence[tuple[int, int]], *, durable: bool = True) -> None:
    """Appends pieces of `MEMORY`, each given by where it begins and its size; checks the file."""
    pieces = [MEMORY[start : start + size] for start, size in wanted]
    total = sum(piece.size for piece in pieces)
    path.unlink(missing_ok=True)
    with NewFile(path, expected_bytes=total, durable=durable) as file:
        offsets = [file.append(piece) for piece in pieces]
        file.finish()
    content = path.read_bytes()
    end = 0
    for offset, piece in zip(offsets, pieces, strict=True):
        assert content[offset : offset + piece.size] == piece.tobytes()
        assert end <= offset < end + direct_io.BLOCK_BYTES or not piece.size
        end = offset + piece.size
    assert len(content) - end < direct_io.BLOCK_BYTES


@pytest.mark.parametrize("durable", [True, False])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=runs)
def test_what_is_appended_is_where_it_was_said_to_be(
    tmp_path: Path, *, durable: bool, wanted: list[tuple[int, int]]
) -> None:
    write(tmp_path / "data", wanted, durable=durable)


def test_more_runs_than_one_call_of_the_kernel_takes_are_written(tmp_path: Path) -> None:
    write(tmp_path / "data", [(7 * number, 65_536 + number) for number in range(1500)])
    write(tmp_path / "data", [(number, 20_000) for number in range(1500)])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EFAULT])
def test_where_the_kernel_refuses_it_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A file system may take the flag when opening, and refuse it when writing."""
    real, refused = os.writev, []

    def writev(descriptor: int, buffers: Any) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "writev", writev)
    write(tmp_path / "data", [(3, 1 << 20), (5, 100), (0, 300_000), (1, 4096)])
    assert len(refused) == 1


def test_where_the_flag_is_refused_it_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have created the file by then."""
    real = os.open

    def refusing(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = real(path, flags & ~os.O_DIRECT, mode, **more)
        if flags & os.O_DIRECT:
            os.close(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return descriptor

    monkeypatch.setattr(os, "open", refusing)
    write(tmp_path / "data", [(3, 2 << 20), (5, 100)])


@pytest.mark.parametrize("step", [1 << 16, 4096, 4095])
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda file, buffers: real(file, [buffers[0][:step]]))
    write(tmp_path / "data", [(3, 1 << 20), (5, 100), (0, 300_000)])


def test_error_of_writing_is_raised_and_closes_the_file(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with files_of_at_most(1 << 20), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "data", [(0, 1 << 20), (0, 1 << 20)])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Any) -> None:
    """Has a function's arguments noted before it is called."""
    real = getattr(owner, name)

    def noting(*arguments: Any, **options: Any) -> Any:
        note(*arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, noting)


def test_large_file_is_written_around_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system can; and nothing but the ends of runs is copied on the way."""
    flags: list[int] = []
    taken: list[int] = []
    watch(monkeypatch, os, "open", lambda _, flag, *_more: flags.append(flag & os.O_DIRECT))
    buffer = direct_io._Buffer  # noqa: SLF001
    watch(monkeypatch, buffer, "fill", lambda _, view: taken.append(len(view)))
    write(tmp_path / "data", [(1, 2 << 20), (2, 2 << 20)])
    assert flags[0]
    assert sum(taken) < 8 * direct_io.BLOCK_BYTES
    write(tmp_path / "data", [(1, 1000)])
    assert not flags[-1]
