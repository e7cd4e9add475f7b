"""What an earlier checkpoint holds is not written again, and each checkpoint is whole by itself."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import trees
from jax.sharding import NamedSharding, PartitionSpec
from things import QUICK, stored

import flax_partial as fp

BASE = np.random.default_rng(0).standard_normal((300, 1000), np.float32)  # 1.2 MB
SMALL_CHUNKS = fp.SaveOptions(durable=False, chunk_bytes=100_000)
ZSTD = fp.SaveOptions(durable=False, compression="zstd")


def data_files(path: Path) -> dict[str, tuple[int, int]]:
    """Name of each data file of a checkpoint -> its inode, and how many names it has."""
    files = sorted(path.glob("state/part.*/data*"))
    return {file.name: (file.stat().st_ino, file.stat().st_nlink) for file in files}


def assert_whole(path: Path, state: Any) -> None:
    trees.assert_whole(path, state, target=state)


def reused_bytes(path: Path, state: Any, earlier: Path, **how: Any) -> int:
    """Makes a checkpoint that may share data with an earlier one, and is whole."""
    report = stored(path, state, reuse=earlier, **how)
    assert_whole(path, state)
    return report.reused_bytes


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
    stored(tmp_path / "1", states[0], options=options)
    reused = reused_bytes(tmp_path / "2", states[1], tmp_path / "1", options=options)
    assert reused == fp.metadata(tmp_path / "2").leaves["base"].bytes
    (first,) = data_files(tmp_path / "1").values()
    assert data_files(tmp_path / "2") == {"data.1": first}
    assert_whole(tmp_path / "1", states[0])


def test_removing_either_checkpoint_harms_the_other_in_nothing(tmp_path: Path) -> None:
    states = {
        str(step): {"base": BASE, "adapter": np.full(999, step), "n": step} for step in (1, 2)
    }
    for gone, left in (("1", "2"), ("2", "1")):
        run = tmp_path / gone
        stored(run / "1", states["1"])
        assert reused_bytes(run / "2", states["2"], run / "1") == BASE.nbytes
        shutil.rmtree(run / gone)
        assert_whole(run / left, states[left])
        trees.assert_same(ocp.load(run / left, states[left]), states[left])


def test_what_changed_is_written_beside_what_did_not(tmp_path: Path) -> None:
    adapter = np.zeros((100, 300), np.float32)
    stored(tmp_path / "1", {"base": BASE, "adapter": adapter})
    adapter[-1, -1] = 1
    state = {"base": BASE, "adapter": adapter}
    assert reused_bytes(tmp_path / "2", state, tmp_path / "1") == BASE.nbytes
    assert list(data_files(tmp_path / "2")) == ["data", "data.1"]
    shutil.rmtree(tmp_path / "1")
    assert_whole(tmp_path / "2", state)


def test_a_chain_of_checkpoints_shares_one_file_which_outlives_all_but_the_last(
    tmp_path: Path,
) -> None:
    inodes = set()
    for step in range(1, 6):
        state = {"base": BASE, "adapter": np.full((100, 300), step)}
        before = tmp_path / str(step - 1)
        reused_bytes(tmp_path / str(step), state, before)
        shutil.rmtree(before, ignore_errors=True)
        assert_whole(tmp_path / str(step), state)
        files = data_files(tmp_path / str(step))
        inodes.add(files.get("data.1", files["data"])[0])
    assert len(inodes) == 1


def with_other_bit(*at: int) -> np.ndarray:
    other = BASE.copy()
    other[at] = np.nextafter(other[at], np.float32(9))
    return other


# What differs from a leaf "base" that was saved by some options -> what is saved now, and how.
OTHERS: dict[str, tuple[fp.SaveOptions, Any, fp.SaveOptions]] = {
    "first bit": (SMALL_CHUNKS, {"base": with_other_bit(0, 0)}, SMALL_CHUNKS),
    "a bit": (SMALL_CHUNKS, {"base": with_other_bit(150, 7)}, SMALL_CHUNKS),
    "last bit": (SMALL_CHUNKS, {"base": with_other_bit(299, 999)}, SMALL_CHUNKS),
    "dtype": (QUICK, {"base": BASE.view(np.int32)}, QUICK),
    "shape": (QUICK, {"base": BASE.reshape(1000, 300)}, QUICK),
    "name": (QUICK, {"other": BASE}, QUICK),
    "chunks": (QUICK, {"base": BASE}, SMALL_CHUNKS),
    "compression": (QUICK, {"base": BASE}, ZSTD),
    "no digests to compare": (QUICK, {"base": BASE}, fp.SaveOptions(checksum=False)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_another_leaf_or_stored_otherwise_is_written(tmp_path: Path, case: str) -> None:
    before, state, options = OTHERS[case]
    stored(tmp_path / "1", {"base": BASE}, options=before)
    assert reused_bytes(tmp_path / "2", state, tmp_path / "1", options=options) == 0


def test_stacked_rows_are_reused_however_they_are_cut(tmp_path: Path) -> None:
    rows = np.arange(8 * 30_000, dtype=np.float32).reshape(8, 30_000)
    stored(tmp_path / "1", *({"w": fp.Slice(rows[at : at + 4], at, 8)} for at in (4, 0)))
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
    stored(tmp_path / "1", {"base": BASE}, {"base": -BASE}, replace=True)
    fp.save(tmp_path / "2", {"base": BASE}, options=QUICK, reuse=tmp_path / "1")
    again = stored(tmp_path / "2", {"base": -BASE}, replace=True, reuse=tmp_path / "1")
    assert again.reused_bytes == BASE.nbytes
    shutil.rmtree(tmp_path / "1")
    assert_whole(tmp_path / "2", {"base": -BASE})


def test_file_that_holds_mostly_other_data_is_not_kept_alive(tmp_path: Path) -> None:
    """What is unchanged gets a file of its own, which the checkpoint after shares."""
    reused = []
    for step in range(1, 5):
        state = {"base": BASE, "rest": np.full((3, 300, 1000), step, np.float32)}
        before = tmp_path / str(step - 1)
        reused.append(reused_bytes(tmp_path / str(step), state, before))
        shutil.rmtree(before, ignore_errors=True)
        assert_whole(tmp_path / str(step), state)
    assert reused == [0, 0, BASE.nbytes, BASE.nbytes]
    sizes = [file.stat().st_size for file in tmp_path.rglob("data*")]
    assert sum(sizes) < BASE.nbytes * 4 + 20_000  # no byte that is of no use


@pytest.mark.parametrize(
    ("state", "files"),
    [
        pytest.param({"bias": BASE[0, :100], "step": 1, "text": "x"}, [], id="in the table"),
        pytest.param({"bias": BASE[0], "scale": BASE[:15]}, ["data"], id="in a small file"),
    ],
)
def test_what_is_too_small_for_a_link_is_written_again(
    tmp_path: Path, state: Any, files: list[str]
) -> None:
    stored(tmp_path / "1", state)
    assert reused_bytes(tmp_path / "2", state, tmp_path / "1") == 0
    assert list(data_files(tmp_path / "2")) == files


def test_file_of_which_less_and_less_is_in_use_is_let_go(tmp_path: Path) -> None:
    """However much of it the checkpoint before still used: its true size counts."""
    rows = {"a": 120, "b": 90, "c": 90}
    changes: dict[str, list[str]] = {"1": [], "2": ["c"], "3": ["b", "c"], "4": []}
    values = {name: BASE[:count].copy() for name, count in rows.items()}
    for step, changed in changes.items():
        for name in changed:
            values[name] += 1
        before = tmp_path / str(int(step) - 1)
        reused = reused_bytes(tmp_path / step, values, before)
        shutil.rmtree(before, ignore_errors=True)
        assert_whole(tmp_path / step, values)
        used = sum(file.stat().st_size for file in tmp_path.rglob("data*"))
        assert used <= 2 * sum(value.nbytes for value in values.values())
        wanted = {"1": "", "2": "ab", "3": "", "4": "abc"}[step]
        assert reused == sum(values[name].nbytes for name in wanted)


def test_session_that_is_not_finalized_is_not_shared_with(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"base": BASE}, options=QUICK)
    for unfinished in (tmp_path / "1", tmp_path / "1.partial_save"):
        report = fp.save(tmp_path / "2", {"base": BASE}, options=QUICK, reuse=unfinished)
        assert report.reused_bytes == 0
        fp.abort(tmp_path / "2")
    (tmp_path / "1.partial_save").rename(tmp_path / "1")  # as if it were, without finalize
    assert reused_bytes(tmp_path / "2", {"base": BASE}, tmp_path / "1") == 0


@pytest.mark.parametrize("before", ["nowhere", "not/even/there", "file", "orbax", "2"])
def test_where_there_is_nothing_to_share_everything_is_written(tmp_path: Path, before: str) -> None:
    (tmp_path / "file").write_text("")
    ocp.save(tmp_path / "orbax", {"base": BASE})
    assert reused_bytes(tmp_path / "2", {"base": BASE}, tmp_path / before) == 0


@pytest.mark.parametrize("before", ["", 7])
def test_what_is_no_path_is_refused_before_anything_is_written(tmp_path: Path, before: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fp.save(tmp_path / "1", {"base": BASE}, reuse=before)
    assert not list(tmp_path.iterdir())


def _cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(BASE.nbytes // 2)


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param("data", _cut_short, id="cut short"),
        pytest.param("data", lambda path: path.unlink(), id="lost"),
        pytest.param("data", _replace_by_link, id="a link to elsewhere"),
        pytest.param("part.json", lambda path: path.write_text("{}"), id="table damaged"),
        pytest.param("part.json", lambda path: path.unlink(), id="table lost"),
    ],
)
def test_damage_that_can_be_seen_without_reading_is_not_shared(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    stored(tmp_path / "1", {"base": BASE})
    (path,) = (tmp_path / "1").glob(f"state/part.*/{file}")
    damage(path)
    assert reused_bytes(tmp_path / "2", {"base": BASE}, tmp_path / "1") == 0


def test_damage_to_shared_data_is_found_by_verify_in_both_and_ends_with_other_data(
    tmp_path: Path,
) -> None:
    stored(tmp_path / "1", {"base": BASE})
    (path,) = (tmp_path / "1").glob("state/part.*/data")
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    stored(tmp_path / "2", {"base": BASE}, reuse=tmp_path / "1")
    for name in ("1", "2"):
        assert list(fp.verify(tmp_path / name).bad) == ["base"]
        with pytest.raises(fp.CorruptCheckpointError):
            fp.load(tmp_path / name)
    stored(tmp_path / "3", {"base": BASE})  # written anew
    assert_whole(tmp_path / "3", {"base": BASE})


def _cut_the_rest_short(checkpoint: Path) -> None:
    for file in checkpoint.glob("state/part.*/data*"):
        if file.stat().st_nlink == 1:
            _cut_short(file)


@pytest.mark.parametrize("harm", [shutil.rmtree, _cut_the_rest_short])
def test_earlier_checkpoint_that_goes_while_a_session_is_saved_is_done_without(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    layers = {str(i): BASE + i for i in range(3)}
    stored(tmp_path / "1", *({name: value} for name, value in layers.items()))
    how = {"options": QUICK, "reuse": tmp_path / "1"}
    assert fp.save(tmp_path / "2", {"0": layers.pop("0")}, **how).reused_bytes == BASE.nbytes
    harm(tmp_path / "1")
    for name, value in layers.items():
        assert fp.save(tmp_path / "2", {name: value}, **how).reused_bytes == 0
    fp.finalize(tmp_path / "2")
    trees.assert_same(fp.load(tmp_path / "2", target=layers, partial=True), layers)


def test_earlier_checkpoints_are_removed_while_saves_share_their_files(tmp_path: Path) -> None:
    """Each save finds its file, or writes; whatever the moment at which it goes."""
    layers = {f"layer{i}": BASE[: 30 + i] for i in range(20)}
    stored(tmp_path / "0", *({name: value} for name, value in layers.items()))
    for step in range(1, 13):
        before, path = tmp_path / str(step - 1), tmp_path / str(step)
        handles = [
            fp.save_async(path, {name: value}, options=QUICK, reuse=before)
            for name, value in layers.items()
        ]
        handles[step].add_done_callback(lambda _, before=before: shutil.rmtree(before))
        wait(handles)
        fp.finalize(path)
        assert_whole(path, layers)


def test_other_file_system_is_written_to(tmp_path: Path, other_file_system: Path) -> None:
    stored(other_file_system / "1", {"base": BASE})
    assert reused_bytes(tmp_path / "2", {"base": BASE}, other_file_system / "1") == 0


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own below it
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    directory = Path(tempfile.mkdtemp(dir=memory))
    yield directory
    shutil.rmtree(directory)


def test_random_runs_hold_what_was_saved_whatever_they_share(tmp_path: Path) -> None:
    """Leaves change, move between groups, and are saved again; old checkpoints go at random."""
    draw = random.Random(0)  # noqa: S311 - of changes, not of secrets
    values = {f"leaf{i}": BASE[: draw.randint(1, 60)].copy() for i in range(8)}
    shared = 0
    for step in range(15):
        for value in draw.sample(list(values.values()), draw.randint(0, 3)):
            value[draw.randrange(len(value)), draw.randrange(1000)] += 1
        names = draw.sample(list(values), len(values))
        while names:
            group = [names.pop() for _ in range(min(len(names), draw.randint(1, 4)))]
            before = tmp_path / str(step - draw.choice((1, 1, 2)))
            tree = {name: values[name] for name in group}
            how = {"options": draw.choice((QUICK, QUICK, ZSTD)), "reuse": before}
            shared += fp.save(tmp_path / str(step), tree, **how).reused_bytes
        fp.finalize(tmp_path / str(step))
        for old in fp.steps(tmp_path)[:-1]:
            if draw.random() < 0.4:
                shutil.rmtree(tmp_path / str(old))
        assert_whole(tmp_path / str(step), values)
    assert shared > 3 * sum(value.nbytes for value in values.values())
