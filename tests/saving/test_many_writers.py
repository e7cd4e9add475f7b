"""A large save cut into files that many threads write; and where there are few of them, not."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest
import trees
from things import MOST_SECS, QUICK, stored

import flax_partial as fp
from flax_partial.saving import write
from flax_partial.saving.describe import describe
from flax_partial.sessions import workers
from flax_partial.storage import local_place, medium

if TYPE_CHECKING:
    from collections.abc import Callable

KIB = 1 << 10
STATE = {
    **{f"w{number}": np.full(16 * KIB, number, np.float32) for number in range(20)},  # 64 KiB each
    "b": jnp.arange(40_000),
    "tiny": np.arange(3),
    "packed": "text",
}


@pytest.fixture
def _eight_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_WRITERS", 8)
    monkeypatch.setattr(write, "_LEAST_FILE_BYTES", 128 * KIB)


def data_files(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob("data*") if file.parent.parent.name == "state")


@pytest.mark.usefixtures("_eight_writers")
@pytest.mark.parametrize("checksum", [True, False], ids=["digests", "none"])
def test_a_large_save_is_cut_into_a_file_for_each_writer(tmp_path: Path, *, checksum: bool) -> None:
    options = fp.SaveOptions(durable=False, checksum=checksum)
    stored(tmp_path / "c", STATE, options=options)
    assert data_files(tmp_path / "c") == ["data", *(f"data.{number}" for number in range(1, 8))]
    assert fp.verify(tmp_path / "c").ok
    trees.assert_whole(tmp_path / "c", STATE)


@pytest.mark.usefixtures("_eight_writers")
def test_a_disk_gets_fewer_files_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_memory, count in ((False, 4), (True, 8)):
        monkeypatch.setattr(medium, "is_memory", lambda _, is_memory=is_memory: is_memory)
        path = tmp_path / f"{is_memory}"
        stored(path, STATE, options=fp.SaveOptions())
        assert len(data_files(path)) == count
        assert fp.verify(path).ok


@pytest.mark.parametrize(
    ("writers", "least"),
    [pytest.param(2, 1, id="two writers"), pytest.param(8, 1 << 30, id="a small save")],
)
def test_a_save_is_one_file_where_cutting_it_gains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int, least: int
) -> None:
    monkeypatch.setattr(workers, "MOST_WRITERS", writers)
    monkeypatch.setattr(write, "_LEAST_FILE_BYTES", least)
    stored(tmp_path / "c", STATE)
    assert data_files(tmp_path / "c") == ["data"]
    trees.assert_whole(tmp_path / "c", STATE)


@pytest.mark.usefixtures("_eight_writers")
def test_one_writer_that_fails_fails_the_save_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = local_place.NewFile

    def fail_one(path: Path, **options: Any) -> Any:
        if path.name == "data.3":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return create(path, **options)

    monkeypatch.setattr(local_place, "NewFile", fail_one)
    with pytest.raises(OSError, match=r"data\.3"):
        fp.save(tmp_path / "c", STATE, options=QUICK)
    monkeypatch.undo()
    assert not list(tmp_path.glob("c.partial_save/state/part.*"))
    stored(tmp_path / "c", STATE)
    trees.assert_whole(tmp_path / "c", STATE)


@pytest.mark.usefixtures("_eight_writers")
def test_files_of_a_cut_save_are_shared_with_the_next_checkpoint(tmp_path: Path) -> None:
    stored(tmp_path / "1", STATE)
    changed = STATE | {"w0": np.full(16 * KIB, 7.0, np.float32)}
    report = stored(tmp_path / "2", changed, reuse=tmp_path / "1")
    assert 0 < report.reused_bytes < report.bytes
    trees.assert_whole(tmp_path / "2", changed)


@pytest.mark.parametrize(
    ("sizes", "most", "groups"),
    [
        pytest.param([], 4, [], id="nothing"),
        pytest.param([0, 0], 4, [[0, 1]], id="no bytes"),
        pytest.param([1] * 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]], id="equal leaves"),
        pytest.param([1] * 8, 3, [[0, 1, 2], [3, 4, 5], [6, 7]], id="not quite equal"),
        pytest.param([8, 1, 1], 4, [[0], [1, 2]], id="one large leaf"),
        pytest.param([5], 4, [[0]], id="one leaf"),
        pytest.param([1, 1], 1, [[0, 1]], id="one file"),
    ],
)
def test_leaves_are_cut_in_their_order_by_their_bytes(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], most: int, groups: list[list[int]]
) -> None:
    monkeypatch.setattr(write, "_LEAST_FILE_BYTES", 1)
    arrays = [np.zeros(size, np.uint8) for size in sizes]
    boxes: Any = [(leaf, []) for leaf in describe(arrays, chunk_bytes=64, compression=None).leaves]
    assert write._cut(range(len(sizes)), boxes, most) == groups  # noqa: SLF001


# --- the threads ----------------------------------------------------------------------------------


def test_work_is_spread_over_threads_and_comes_back_in_order() -> None:
    barrier = threading.Barrier(3)

    def work(number: int) -> tuple[int, int]:
        if number < 3:
            barrier.wait(MOST_SECS)  # three at once: this thread and two that help
        return number, threading.get_ident()

    works: list[Callable[[], tuple[int, int]]] = [
        lambda number=number: work(number)  # type: ignore[misc]
        for number in range(5)
    ]
    done = workers.spread(works)
    assert [number for number, _ in done] == [*range(5)]
    assert len({thread for _, thread in done}) >= 3


def test_spread_work_needs_no_thread_that_is_free() -> None:
    """Each thread that helps spreads work of its own: none waits for one that waits."""

    def nested(depth: int) -> int:
        if not depth:
            return 1
        return sum(workers.spread([lambda: nested(depth - 1)] * 3))

    assert nested(4) == 3**4


def test_the_first_error_of_spread_work_is_raised_when_all_has_ended() -> None:
    ended = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        workers.spread([fail, lambda: ended.append(1), lambda: ended.append(2)])
    assert sorted(ended) == [1, 2]


@pytest.mark.parametrize(("cores", "writers"), [(1, 2), (2, 2), (4, 2), (8, 6), (16, 14), (64, 16)])
def test_the_number_of_writers_follows_from_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, writers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert workers._count_writers() == writers  # noqa: SLF001


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no tmpfs")  # noqa: S108
def test_memory_is_told_from_a_disk() -> None:
    assert medium.is_memory(Path("/dev/shm"))  # noqa: S108
    assert not medium.is_memory(Path("/proc"))


def test_what_a_directory_lies_on_may_be_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(medium, "_MOUNTS", tmp_path / "none")
    assert not medium.is_memory(tmp_path)
