"""Processes that hold replicas of an array write it together: each as much, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import sharing
from cluster import Cluster, errors_of, running
from orbax.checkpoint import v1 as ocp

import flax_partial as fp
from flax_partial.saving.shares import _cut, _turn, _writers

OVERHEAD_BYTES = 400_000  # of any load, as in test_distributed


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(4, tmp_path_factory.mktemp("four")) as cluster:
        yield cluster


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


def bytes_of(layout: str) -> int:
    return sum(value.nbytes for value in sharing.values(layout).values())


def assert_even(written: Sequence[int], layout: str) -> None:
    """As much by each of the processes, and everything once."""
    assert sum(written) == bytes_of(layout)
    assert max(written) <= 1.1 * min(written), written


@pytest.mark.parametrize("layout", sharing.LAYOUTS)
def test_replicas_are_written_together_and_may_be_donated(
    four: Cluster, path: Path, layout: str
) -> None:
    assert_even(four.call("save_shared", path, layout, is_async=True), layout)
    four.call("finalize", path)
    assert fp.verify(path).ok
    four.call("load_shared", path, layout, (2, 4))
    sharing.load_shared(path, layout, (4, 2))
    loaded = ocp.load(path, {k: np.zeros_like(v) for k, v in sharing.values(layout).items()})
    for name, value in sharing.values(layout).items():
        np.testing.assert_array_equal(loaded[name], value)


@pytest.mark.parametrize("layout", sharing.LAYOUTS)
def test_callback_has_them_share_without_being_told(
    four: Cluster, tmp_path: Path, layout: str
) -> None:
    done = four.call("train_shared", tmp_path, layout)
    assert_even([written for written, _ in done], layout)
    loaded = fp.load(tmp_path / "1")["params"]
    for name, value in sharing.values(layout).items():
        np.testing.assert_array_equal(loaded[name], value)
    alone = fp.SaveOptions(durable=False, share_replicas=False)
    done = four.call("train_shared", tmp_path / "alone", "replicated", options=alone)
    assert [written > 0 for written, _ in done] == [True, False, False, False]


def test_rows_of_stacked_leaves_take_turns(four: Cluster, tmp_path: Path) -> None:
    done = four.call("train_shared", tmp_path, "replicated", stacked={"params.embed": 1})
    assert_even([written for written, _ in done], "replicated")
    rows = [{group for group in groups if "embed." in group} for _, groups in done]
    assert [len(of_one) for of_one in rows] == [24] * 4
    assert len(set().union(*rows)) == 96
    np.testing.assert_array_equal(
        fp.load(tmp_path / "1")["params"]["embed"], sharing.values("replicated")["embed"]
    )


def test_first_process_alone_may_save_what_is_replicated(four: Cluster, path: Path) -> None:
    options = fp.SaveOptions(durable=False)
    (written,) = four.call("save_shared", path, "replicated", options=options, on=[0])
    assert written == bytes_of("replicated")
    four.call("finalize", path)
    sharing.load_shared(path, "replicated", (4, 2))


def test_share_that_is_missing_is_told_with_its_process_and_can_be_saved(
    four: Cluster, path: Path
) -> None:
    four.call("save_shared", path, "replicated", on=[0, 1, 3])
    for error in four.errors("finalize", path):
        assert isinstance(error, fp.IncompleteCheckpointError)
        assert "kernel (" in str(error)
        assert str(error).count("without the share of process 2") >= 3 + 1
        assert "process 1" not in str(error)
    four.call("save_shared", path, "replicated", on=[2])
    four.call("finalize", path)
    sharing.load_shared(path, "replicated", (4, 2))


def test_shares_of_unchanged_arrays_are_shared_with_an_earlier_checkpoint(
    four: Cluster, tmp_path: Path
) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    four.call("save_shared", first, "replicated", only=["kernel", "embed"])
    four.call("finalize", first)
    four.call("save_shared", second, "replicated", only=["kernel", "embed"], reuse=first)
    four.call("finalize", second)
    (data,) = {file.stat().st_nlink for file in second.glob("state/part.*/data*")}
    assert data == 2


def test_replicas_are_read_once_and_handed_on_where_that_is_asked_for(
    four: Cluster, path: Path
) -> None:
    four.call("save_shared", path, "even")
    four.call("finalize", path)
    total, how = bytes_of("even"), {"share_reads": True}
    for read in four.call("load_shared", path, "even", sharing.LAYOUTS["even"][0], **how):
        assert read <= total / 4 + OVERHEAD_BYTES < total / 2
    for layout in ("replicated", "mixed"):
        four.call("save_shared", path.with_name(layout), layout)
        four.call("finalize", path.with_name(layout))
        mesh_shape = sharing.LAYOUTS[layout][0]
        four.call("load_shared", path.with_name(layout), layout, mesh_shape, **how)


def test_killed_process_is_named_and_the_next_job_goes_on(tmp_path: Path) -> None:
    path, logs = tmp_path / "c", tmp_path / "logs"
    logs.mkdir()
    with running(4, logs) as cluster:
        cluster.call("save_shared", path, "mixed", on=[0, 1, 3])
        begun = cluster.start("finalize", path, on=[0, 1, 3], timeout_secs=3)
        cluster.processes[2].kill()
        for error in errors_of(begun):
            assert isinstance(error, fp.IncompleteCheckpointError)
            assert "[2]" in str(error)
        begun = cluster.start("finalize", path, on=[0, 1, 3], processes=[0, 1, 3])
        for error in errors_of(begun):
            assert "without the share of process 2" in str(error)
        for process in cluster.processes:
            process.kill()  # their own end would wait for the one that is dead
    with running(4, logs) as cluster:
        cluster.call("save_shared", path, "mixed", on=[2])  # what others have saved stays
        cluster.call("finalize", path)
        cluster.call("load_shared", path, "mixed", (2, 4))


# The rules, which all processes come to by themselves.


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("pieces", [1, 2, 5, 40, 41])
def test_every_piece_has_one_writer_and_writers_are_known(processes: int, pieces: int) -> None:
    holders = tuple(range(3, 3 + 2 * processes, 2))
    for name in ("a[0]", "b[0]", "layers.kernel[7, 0]"):
        turns = {process: _turn(holders, process, pieces, name) for process in holders}
        assert sorted(piece for turn in turns.values() for piece in turn) == list(range(pieces))
        sizes = [len(turn) for turn in turns.values()]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(_writers(holders, pieces, name)) == [p for p in holders if turns[p]]


CUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, int, int]]] = {
    "even": ((1024, 1024), (1024, 1024), 4, (0, 256, 4)),
    "a prime": ((50_257, 768), (50_257, 768), 4, (0, 12_565, 4)),
    "a prime that is sharded": ((50_257, 768), (100_514, 768), 4, (1, 192, 4)),
    "few rows": ((3, 60_000), (3, 60_000), 4, (1, 15_000, 4)),
    "in one piece": ((64, 64), (64, 64), 1, (-1, 0, 1)),
    "no axis": ((3, 3, 60_001), (3, 3, 120_002), 4, (-1, 0, 1)),
}


@pytest.mark.parametrize(("box", "shape", "pieces", "wanted"), CUTS.values(), ids=CUTS)
def test_box_is_cut_along_the_first_axis_that_is_cut_evenly(
    box: tuple[int, ...], shape: tuple[int, ...], pieces: int, wanted: tuple[int, int, int]
) -> None:
    cut = _cut(box, shape, frozenset(), pieces)
    assert (cut.axis, cut.length, cut.pieces) == wanted


def test_arrays_of_one_process_are_not_shared(path: Path) -> None:
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec())
    array = jax.device_put(np.ones((512, 512), np.float32), sharding)
    report = fp.save(path, {"w": array}, options=sharing.SHARED)
    assert report.bytes == array.nbytes
    fp.finalize(path)
    np.testing.assert_array_equal(fp.load(path)["w"], array)
