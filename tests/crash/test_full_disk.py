"""A full disk: what fails says how much room is missing, and succeeds once there is room."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from promises import same
from things import run_or_skip, stored, trainer
from workload import TRAINED

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

SIZE = 24 << 20
LARGE = np.random.default_rng(3).standard_normal(1_500_000, np.float32)  # 6 MB


@pytest.fixture(params=["memory", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    where, image = tmp_path / "disk", tmp_path / "image"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(where)]
    if request.param == "ext4":  # around the page cache, with a journal
        image.touch()
        os.truncate(image, 2 * SIZE)
        mount = ["mount", "-o", "loop", str(image), str(where)]
        run_or_skip(["mkfs.ext4", "-q", "-m", "0", str(image)])
    run_or_skip(mount)
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill(disk: Path, *, but: int) -> Path:
    """Takes all room but so many bytes."""
    path = disk / "filler"
    with path.open("wb") as file:
        while (room := _free(disk) - but) > 0:
            try:
                file.write(bytes(min(room, 1 << 16)))
                file.flush()
            except OSError:
                break
    return path


def _free(disk: Path) -> int:
    status = os.statvfs(disk)
    return int(status.f_bavail * status.f_frsize)


def fails_for_room(call: Callable[[], object], *, needed: range, free: range) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        call()
    assert caught.value.errno == errno.ENOSPC
    found = re.search(r"about ([\d,]+) bytes .* and ([\d,]+) are free", str(caught.value))
    assert found, caught.value
    first, second = (int(text.replace(",", "")) for text in found.groups())
    assert first in needed
    assert second in free


def test_saves_and_finalize_fail_for_room_and_succeed_with_room(disk: Path) -> None:
    path = disk / "run" / "1"
    small = {f"{i:04}": np.full(900, i, np.float64) for i in range(20)}
    fp.save(path, {"first": np.arange(10)})
    filler = fill(disk, but=3 << 20)
    near = range(2 << 20, 4 << 20)
    large = range(LARGE.nbytes, LARGE.nbytes + 10_000)
    fails_for_room(lambda: fp.save(path, {"large": LARGE}), needed=large, free=near)
    handle = fp.save_async(path, {"large": LARGE})
    fails_for_room(handle.result, needed=large, free=near)
    assert fp.status(path).leaves == ("first",)
    assert fp.status(path).torn == ()
    fp.save(path, small)  # there is room for this
    filler.unlink()
    fp.save(path, {"large": LARGE})

    filler = fill(disk, but=0)
    fails_for_room(lambda: fp.finalize(path), needed=range(1000, 200_000), free=range(200_000))
    many = {f"{i}": np.full(8, i, np.float32) for i in range(2000)}
    fails_for_room(
        lambda: fp.save(path, {"many": many}), needed=range(64_000, 2_000_000), free=range(200_000)
    )
    assert not path.exists()
    assert len(fp.status(path).parts) == 3
    filler.unlink()
    stored(path, {"many": many}, options=None)
    wanted = {"first": np.arange(10), **small, "large": LARGE, "many": many}
    same(fp.load(path), wanted, "the checkpoint")
    assert fp.verify(path).ok
    assert [entry.name for entry in path.parent.iterdir()] == ["1"]


def test_not_even_a_session_fits_in(disk: Path) -> None:
    filler = fill(disk, but=0)
    path = disk / "runs" / "lm" / "1"
    state = {f"{i}": np.full(100, i) for i in range(500)}
    fails_for_room(
        lambda: fp.save(path, state), needed=range(400_000, 2_000_000), free=range(200_000)
    )
    filler.unlink()
    stored(path, state, options=None)
    same(fp.load(path), state, "the checkpoint")


def test_training_on_a_full_disk_says_so_and_goes_on_later(disk: Path) -> None:
    loop = trainer()

    def train(step: int) -> None:
        loop.global_step, loop.state = step, {**TRAINED, "large": LARGE + np.float32(step)}
        callback.on_train_batch_end(loop, None, None, None, 0)
        callback.on_train_epoch_end(loop, None)
        callback.finalizer.wait()

    callback = PartialCheckpointCallback(disk / "run", on_save_error="warn")
    callback.setup(loop, None, "fit")
    callback.on_fit_start(loop, None)
    filler = fill(disk, but=14 << 20)
    train(1)
    train(2)
    train(3)  # there is no room for a third
    assert fp.steps(disk / "run") == [1, 2]
    assert callback.failed_saves == 1
    assert {entry.name for entry in (disk / "run").iterdir()} - {"timeline"} == {"1", "2"}
    filler.unlink()
    train(4)
    restored = callback.restore()
    assert restored is not None
    assert restored[1] == 4
    same(restored[0]["large"], LARGE + np.float32(4), "large")
    callback.teardown(loop, None, "fit")
