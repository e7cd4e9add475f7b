"""An array that was saved and lives on is neither copied from its device nor hashed again.

Arrays on a CPU are not taken for such: the memory may be a NumPy array's, too. There is no other
device here, so that these tests have them taken so; all else is what runs on an accelerator.
"""

from __future__ import annotations

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import NamedSharding, PartitionSpec
from things import QUICK, stored

import flax_partial as fp
from flax_partial.loading.host_memory import aligned_empty
from flax_partial.saving import describe, describe_leaf, job, snapshot

ROWS = np.random.default_rng(0).standard_normal((200, 1000), np.float32)
DURABLE = fp.SaveOptions()


@pytest.fixture(autouse=True)
def copied_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Size of each box that is copied to the host from now on."""
    copied: list[int] = []
    to_host = snapshot.to_host

    def counting(source: describe_leaf.Source) -> np.ndarray:
        copied.append(source.nbytes)
        return to_host(source)

    monkeypatch.setattr(snapshot, "to_host", counting)
    monkeypatch.setattr(describe, "_is_on_accelerator", lambda _: True)
    return copied


def checkpoints(directory: Path, state: Any, count: int, **how: Any) -> list[fp.SaveReport]:
    """Saves a state again and again, sharing each time with the checkpoint before."""
    reports = []
    for step in range(1, count + 1):
        before, path = directory / str(step - 1), directory / str(step)
        handle = fp.save_async(path, state, **{"options": QUICK, "reuse": before, **how})
        reports.append(handle.result())
        fp.finalize(path)
    return reports


def assert_whole(path: Path, state: Any) -> None:
    trees.assert_whole(path, state, target=state)


def sharded() -> jax.Array:
    return jax.device_put(ROWS, NamedSharding(trees.mesh("xy"), PartitionSpec("x", "y")))


@pytest.mark.parametrize("options", [QUICK, DURABLE], ids=["", "durable"])
@pytest.mark.parametrize("make", [lambda: jnp.asarray(ROWS), sharded], ids=["whole", "sharded"])
def test_array_that_lives_on_is_not_copied_again(
    tmp_path: Path, copied_bytes: list[int], make: Any, options: fp.SaveOptions
) -> None:
    frozen = make()
    state = {"frozen": frozen, "tied": frozen, "n": np.float64(1)}
    reports = checkpoints(tmp_path, state, 3, options=options)
    assert [report.reused_bytes for report in reports] == [0, 2 * ROWS.nbytes, 2 * ROWS.nbytes]
    assert sum(copied_bytes) == 2 * ROWS.nbytes + 3 * 8
    for step in "12":
        shutil.rmtree(tmp_path / step)
    assert_whole(tmp_path / "3", state)


def test_arrays_of_a_cpu_are_always_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may share their memory with a NumPy array that is written to."""
    monkeypatch.undo()
    memory = aligned_empty(ROWS.shape, ROWS.dtype)
    memory[...] = ROWS
    state = {"frozen": jax.device_put(memory, may_alias=True)}
    checkpoints(tmp_path, state, 2)
    memory[7] = 5
    assert (np.asarray(state["frozen"])[7] == 5).all()
    stored(tmp_path / "3", state, reuse=tmp_path / "2")
    assert (np.asarray(fp.load(tmp_path / "3")["frozen"])[7] == 5).all()


def test_array_that_may_be_donated_or_deleted_at_once_is_saved(tmp_path: Path) -> None:
    state = {"frozen": jnp.asarray(ROWS)}
    checkpoints(tmp_path, state, 2)
    handle = fp.save_async(tmp_path / "3", state, options=QUICK, reuse=tmp_path / "2")
    state["frozen"].delete()
    assert handle.result().reused_bytes == ROWS.nbytes
    fp.finalize(tmp_path / "3")
    assert_whole(tmp_path / "3", {"frozen": jnp.asarray(ROWS)})


def test_another_array_at_the_place_of_one_that_died_is_another(tmp_path: Path) -> None:
    ids = set()
    for step in range(1, 12):
        state = {"w": jnp.asarray(ROWS) + step}
        ids.add(id(state["w"]))
        path = tmp_path / str(step)
        assert stored(path, state, reuse=tmp_path / str(step - 1)).reused_bytes == 0
        assert_whole(path, state)
        del state
        gc.collect()
    assert len(ids) < 11  # or this has tried nothing


@pytest.mark.parametrize(
    ("options", "is_there"),
    [
        pytest.param(QUICK, False, id="its file is gone"),
        pytest.param(fp.SaveOptions(chunk_bytes=99_999), True, id="in other chunks"),
        pytest.param(DURABLE, True, id="not on the disk for certain"),
    ],
)
def test_array_that_was_saved_otherwise_is_copied_and_written(
    tmp_path: Path, copied_bytes: list[int], *, options: fp.SaveOptions, is_there: bool
) -> None:
    state = {"frozen": jnp.asarray(ROWS)}
    checkpoints(tmp_path, state, 2)
    if not is_there:
        next((tmp_path / "2").glob("state/part.*/data*")).unlink()
    copied_bytes.clear()
    stored(tmp_path / "3", state, options=options, reuse=tmp_path / "2")
    assert copied_bytes == [ROWS.nbytes]
    assert_whole(tmp_path / "3", state)


def test_save_that_fails_leaves_nothing_of_what_it_shared(tmp_path: Path) -> None:
    state = {"frozen": jnp.asarray(ROWS)}
    checkpoints(tmp_path, state, 2)
    fp.save(tmp_path / "3", {"other": 1}, options=QUICK)
    conflicting = {"frozen": state["frozen"], "other": 2}
    with pytest.raises(fp.KeyConflictError):
        fp.save(tmp_path / "3", conflicting, options=QUICK, reuse=tmp_path / "2")
    assert len(list(tmp_path.glob("3.partial_save/state/part.*"))) == 1
    fp.save(tmp_path / "3", state, options=QUICK, reuse=tmp_path / "2")
    fp.abort(tmp_path / "3")
    assert not (tmp_path / "3.partial_save").exists()
    assert_whole(tmp_path / "2", state)


def test_what_is_shared_waits_for_no_memory(tmp_path: Path) -> None:
    """Even where snapshots of other saves hold all that they may."""
    state = {"frozen": jnp.asarray(ROWS)}
    options = fp.SaveOptions(durable=False, max_inflight_bytes=ROWS.nbytes)
    checkpoints(tmp_path, state, 2, options=options)
    other = object()
    budget = job._budget  # noqa: SLF001 - held as a slow save would hold it
    budget.acquire(other, ROWS.nbytes, limit=None)
    with ThreadPoolExecutor(1) as thread:
        try:
            save = partial(fp.save_async, options=options, reuse=tmp_path / "2")
            handle = thread.submit(save, tmp_path / "3", state)
            assert handle.result(timeout=20).result().reused_bytes == ROWS.nbytes
        finally:
            budget.release(other, limit=None)
    fp.finalize(tmp_path / "3")
    assert_whole(tmp_path / "3", state)
