"""What an earlier checkpoint holds is not written again, and each checkpoint is whole by itself."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import trees
from jax.sharding import NamedSharding, PartitionSpec
from things import QUICK

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BASE = np.random.default_rng(0).standard_normal((300, 1000), np.float32)  # 1.2 MB
SMALL_CHUNKS = fp.SaveOptions(durable=False, chunk_bytes=100_000)
ZSTD = fp.SaveOptions(durable=False, compression="zstd")


def checkpoint(path: Path, state: Any, **how: Any) -> fp.SaveReport:
    report = fp.save(path, state, **{"options": QUICK, **how})
    fp.finalize(path)
    return report


def data_files(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each data file of a checkpoint -> its inode, and how many names it has."""
    files = sorted(path.glob("state/part.*/data*"))
    return {file.name: (file.stat().st_ino, file.stat().st_nlink) for file in files}


def assert_whole(path: Path, state: Any) -> None:
    report = fp.verify(path)
    assert report.ok, report.bad
    trees.assert_same(fp.load(path, target=state), state)


def sharded(value: np.ndarray, *spec: Any) -> jax.Array:
    return jax.device_put(value, NamedSharding(trees.mesh("xy"), PartitionSpec(*spec)))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(lambda: BASE, QUICK, id="NumPy array"),
        pytest.param(lambda: jnp.asarray(BASE), QUICK, id="jax.Array"),
        pytest.param(lambda: jnp.asarray(BASE), SMALL_CHUNKS, id="many chunks"),
        pytest.param(lambda: jnp.asarray(BASE[:299, :997]), SMALL_CHUNKS, id="padded chunks"),
        pytest.param(lambda: sharded(BASE, "x", "y"), SMALL_CHUNKS, id="sharded"),
        pytest.param(lambda: sharded(BASE, None, "x"), QUICK, id="replicated over an axis"),
        pytest.param(lambda: jnp.asarray(BASE, jnp.bfloat16), QUICK, id="bfloat16"),
        pytest.param(lambda: trees.random_bits("int4", (300, 900), 3), QUICK, id="int4"),
        pytest.param(lambda: jax.random.split(jax.random.key(0), 20_000), QUICK, id="PRNG keys"),
        pytest.param(lambda: jnp.asarray(BASE), ZSTD, id="compressed"),
    ],
)
def test_unchanged_leaf_is_not_written_again(
    tmp_path: Path, make: Callable[[], Any], options: fp.SaveOptions
) -> None:
    states = [{"base": make(), "step": step} for step in (1, 2)]
    checkpoint(tmp_path / "1", states[0], options=options)
    report = checkpoint(tmp_path / "2", states[1], options=options, reuse=tmp_path / "1")
    assert report.reused_bytes == fp.metadata(tmp_path / "2").leaves["base"].bytes
    (first,) = data_files(tmp_path / "1").values()
    assert data_files(tmp_path / "2") == {"data.1": first}
    for path, state in zip((tmp_path / "1", tmp_path / "2"), states, strict=True):
        assert_whole(path, state)


def test_removing_either_checkpoint_harms_the_other_in_nothing(tmp_path: Path) -> None:
    states = {
        str(step): {"base": BASE, "adapter": np.full(999, step), "n": step} for step in (1, 2)
    }
    for gone, left in (("1", "2"), ("2", "1")):
        run = tmp_path / gone
        checkpoint(run / "1", states["1"])
        assert checkpoint(run / "2", states["2"], reuse=run / "1").reused_bytes == BASE.nbytes
        shutil.rmtree(run / gone)
        assert_whole(run / left, states[left])
        trees.assert_same(ocp.load(run / left, states[left]), states[left])


def test_what_changed_is_written_beside_what_did_not(tmp_path: Path) -> None:
    adapter = np.zeros((100, 300), np.float32)
    checkpoint(tmp_path / "1", {"base": BASE, "adapter": adapter})
    adapter[-1, -1] = 1
    report = checkpoint(tmp_path / "2", {"base": BASE, "adapter": adapter}, reuse=tmp_path / "1")
    assert report.reused_bytes == BASE.nbytes
    assert list(data_files(tmp_path / "2")) == ["data", "data.1"]
    shutil.rmtree(tmp_path / "1")
    assert_whole(tmp_path / "2", {"base": BASE, "adapter": adapter})


def test_a_chain_of_checkpoints_shares_one_file_which_outlives_all_but_the_last(
    tmp_path: Path,
) -> None:
    inodes = set()
    for step in range(1, 6):
        state = {"base": BASE, "adapter": np.full((100, 300), step)}
        before = tmp_path / str(step - 1)
        checkpoint(tmp_path / str(step), state, reuse=before)
        shutil.rmtree(before, ignore_errors=True)
        assert_whole(tmp_path / str(step), state)
        files = data_files(tmp_path / str(step))
        inodes.add(files.get("data.1", files["data"])[0])
    assert len(inodes) == 1


@pytest.mark.parametrize("at", [(0, 0), (150, 7), (299, 999)])
def test_one_other_bit_is_written(tmp_path: Path, at: tuple[int, int]) -> None:
    other = BASE.copy()
    other[at] = np.nextafter(other[at], np.float32(9))
    checkpoint(tmp_path / "1", {"base": BASE}, options=SMALL_CHUNKS)
    report = checkpoint(tmp_path / "2", {"base": other}, options=SMALL_CHUNKS, reuse=tmp_path / "1")
    assert report.reused_bytes == 0
    assert_whole(tmp_path / "2", {"base": other})


@pytest.mark.parametrize(
    ("state", "options"),
    [
        pytest.param({"base": BASE.view(np.int32)}, QUICK, id="dtype"),
        pytest.param({"base": BASE.reshape(1000, 300)}, QUICK, id="shape"),
        pytest.param({"other": BASE}, QUICK, id="name"),
        pytest.param({"base": BASE}, SMALL_CHUNKS, id="chunks"),
        pytest.param({"base": BASE}, ZSTD, id="compression"),
        pytest.param({"base": BASE}, fp.SaveOptions(checksum=False), id="no digests to compare"),
    ],
)
def test_the_same_bytes_of_another_leaf_are_written(
    tmp_path: Path, state: Any, options: fp.SaveOptions
) -> None:
    checkpoint(tmp_path / "1", {"base": BASE})
    report = checkpoint(tmp_path / "2", state, options=options, reuse=tmp_path / "1")
    assert report.reused_bytes == 0
    assert_whole(tmp_path / "2", state)


def test_stacked_rows_are_reused_however_they_are_cut(tmp_path: Path) -> None:
    rows = np.arange(8 * 30_000, dtype=np.float32).reshape(8, 30_000)
    for start in (4, 0):
        fp.save(tmp_path / "1", {"w": fp.Slice(rows[start : start + 4], start, 8)}, options=QUICK)
    fp.finalize(tmp_path / "1")
    reused = []
    for start, stop in ((0, 2), (2, 4), (4, 8)):
        piece = {"w": fp.Slice(rows[start:stop], start, 8)}
        report = fp.save(tmp_path / "2", piece, options=QUICK, reuse=tmp_path / "1")
        reused.append(report.reused_bytes // rows[0].nbytes)
    fp.finalize(tmp_path / "2")
    assert reused == [2, 2, 4]
    shutil.rmtree(tmp_path / "1")
    assert_whole(tmp_path / "2", {"w": rows})


def test_newest_generation_is_what_is_compared(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"base": BASE}, options=QUICK)
    checkpoint(tmp_path / "1", {"base": -BASE}, replace=True)
    fp.save(tmp_path / "2", {"base": BASE}, options=QUICK, reuse=tmp_path / "1")
    again = checkpoint(tmp_path / "2", {"base": -BASE}, replace=True, reuse=tmp_path / "1")
    assert again.reused_bytes == BASE.nbytes
    shutil.rmtree(tmp_path / "1")
    assert_whole(tmp_path / "2", {"base": -BASE})


def test_file_that_holds_mostly_other_data_is_not_kept_alive(tmp_path: Path) -> None:
    """What is unchanged gets a file of its own, which the checkpoint after shares."""
    reused = []
    for step in range(1, 5):
        state = {"base": BASE, "rest": np.full((3, 300, 1000), step, np.float32)}
        before = tmp_path / str(step - 1)
        reused.append(checkpoint(tmp_path / str(step), state, reuse=before).reused_bytes)
        shutil.rmtree(before, ignore_errors=True)
        assert_whole(tmp_path / str(step), state)
    assert reused == [0, 0, BASE.nbytes, BASE.nbytes]
    sizes = [file.stat().st_size for file in tmp_path.rglob("data*")]
    assert sum(sizes) < BASE.nbytes * 4 + 20_000  # no byte that is of no use
