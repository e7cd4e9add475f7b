"""Real processes, two devices each, make one checkpoint: stages, global arrays, agreement."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cluster_worker as worker
import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from cluster import Cluster, errors_of, gather, running, seconds
from orbax_side import READERS, STEP

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOUR = ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11])  # layers of each of four stages
LAYER_BYTES = sum(value.nbytes for value in worker.layer(0).values())
OVERHEAD_BYTES = 400_000  # of any load: table of contents, manifest, B-tree nodes (some repeatedly)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(4, tmp_path_factory.mktemp("four")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(3, tmp_path_factory.mktemp("three")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(2, tmp_path_factory.mktemp("two")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three processes that share nothing but the file system."""
    with running(3, tmp_path_factory.mktemp("loose"), is_distributed=False) as cluster:
        yield cluster


def each(cluster: Cluster, name: str, path: Path, shares: Sequence[Any], **options: Any) -> Any:
    """Each process does the same with its own share, at the same time."""
    answers = {
        i: process.call(name, str(path), share, **options)
        for i, (process, share) in enumerate(zip(cluster.processes, shares, strict=True))
    }
    return gather(answers)


def written_boxes(session: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Leaf, start and writing process of every box in a session's parts, from its own JSON."""
    boxes = []
    for table in session.glob("state/part.*/part.json"):
        content = json.loads(table.read_text())
        body = content.get("table", content)
        boxes += [
            (".".join(row["path"]), tuple(start), body["process"])
            for row in body["leaves"]
            for start, *_ in row.get("boxes", ())
        ]
    return boxes


# One process per stage.


@pytest.fixture(scope="module")
def stages(four: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that four stages wrote."""
    path = tmp_path_factory.mktemp("stages") / "checkpoint"
    each(four, "save_stage", path, FOUR)
    four.call("finalize", str(path))
    return path


def test_stages_save_at_different_times_and_running_different_programs(
    four: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    for index in (2, 0, 3, 1):  # each alone: a hidden collective would wait for the others
        shares = FOUR[index][: index + 1]  # and not even as many saves in each
        four.call("save_stage", str(path), shares, on=[index])
        assert fp.status(path).processes[-1] <= 3
    assert fp.status(path).processes == (0, 1, 2, 3)
    names = four.call("finalize", str(path))
    assert all(one == names[0] for one in names)
    numbers = [0, 3, 4, 6, 7, 8, 9, 10, 11]
    assert worker.load_stage(str(path), numbers) > 0
    assert set(names[0]) == {
        "opt_state.count",
        *(f"params.blocks.{number}.{kind}" for number in numbers for kind in ("bias", "kernel")),
    }


def test_what_every_stage_owns_is_stored_once(four: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "c"
    each(four, "save_stage", path, FOUR)
    counts = [
        box
        for box in written_boxes(fp.status(path).path.with_name("c.partial_save"))
        if box[0] == "opt_state.count"
    ]
    assert len(counts) == 4
    four.call("finalize", str(path))
    assert fp.metadata(path).leaves["opt_state.count"].bytes == 4
    assert fp.verify(path).ok


def test_stages_that_differ_on_what_they_share_are_told_so_everywhere(
    four: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    for index, numbers in enumerate(FOUR):
        four.call("save_stage", str(path), numbers, count=7 + index // 3, on=[index])
    errors = four.errors("finalize", str(path))
    assert [type(error) for error in errors] == [fp.KeyConflictError] * 4
    assert all("opt_state.count" in str(error) for error in errors)
    four.call("save_stage", str(path), FOUR[3], count=7, replace=True, on=[3])
    for index in range(3):  # a new generation, from all: the others' older one does not count
        four.call("save_stage", str(path), FOUR[index], count=7, replace=True, on=[index])
    four.call("finalize", str(path))
    assert worker.load_stage(str(path), range(12)) > 0


def test_four_stages_load_into_four_others_each_reading_its_own_layers_only(
    four: Cluster, stages: Path
) -> None:
    other = ([0], [1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11])
    read = each(four, "load_stage", stages, other)
    for numbers, bytes_read in zip(other, read, strict=True):
        wanted = LAYER_BYTES * len(numbers)
        assert wanted <= bytes_read <= wanted + OVERHEAD_BYTES


def test_four_stages_load_into_two(two: Cluster, stages: Path) -> None:
    each(two, "load_stage", stages, (range(6), range(6, 12)))


def test_four_stages_load_into_one(stages: Path) -> None:
    worker.load_stage(str(stages), range(12))
    blocks = fp.load(stages)["params"]["blocks"]
    assert len(blocks) == 12
    for number in range(12):
        jax.tree.map(np.testing.assert_array_equal, blocks[str(number)], worker.layer(number))


def test_four_stages_are_read_by_orbax(stages: Path) -> None:
    loaded = ocp.load(stages)
    for number in range(12):
        block = loaded["params"]["blocks"][str(number)]
        jax.tree.map(np.testing.assert_array_equal, block, worker.layer(number))
    assert int(loaded["opt_state"]["count"]) == 7


def test_saves_in_the_background_hold_what_was_handed_over(four: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "c"
    each(four, "save_stage_async", path, FOUR)
    four.call("finalize", str(path))  # it waits for them, in every process
    for number in range(12):
        block = fp.load(path)["params"]["blocks"][str(number)]
        jax.tree.map(np.testing.assert_array_equal, block, worker.layer(number))


# Global arrays.


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1)], ids=str)
def test_box_of_a_global_array_is_written_once(
    four: Cluster, tmp_path: Path, shape: tuple[int, int]
) -> None:
    path = tmp_path / "c"
    four.call("save_global", str(path), shape)
    boxes = written_boxes(path.with_name("c.partial_save"))
    assert len({box[:2] for box in boxes}) == len(boxes)
    x, y = shape
    shards = {"both": x * y, "first": x, "second": y, "swapped": x * y, "joined": 8, "nowhere": 1}
    counted = {name: sum(box[0] == name for box in boxes) for name in shards}
    assert counted == shards
    assert {box[2] for box in boxes if box[0] == "joined"} == {0, 1, 2, 3}
    four.call("finalize", str(path))
    assert fp.verify(path).ok
    total = sum(value.nbytes for value in worker.global_values().values())
    assert fp.metadata(path).bytes == total
    stored = sum(file.stat().st_size for file in path.glob("state/part.*/data"))
    assert total <= stored < total * 1.1


@pytest.fixture(scope="module")
def spread(four: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of arrays that are spread over four processes."""
    path = tmp_path_factory.mktemp("spread") / str(STEP)
    four.call("save_global", str(path), (4, 2))
    four.call("finalize", str(path))
    return path


def test_global_arrays_load_onto_other_meshes_reading_what_each_process_holds(
    four: Cluster, two: Cluster, spread: Path
) -> None:
    sizes = {name: value.nbytes for name, value in worker.global_values().items()}
    for read in four.call("load_global", str(spread), (8, 1), is_reversed=True):
        own = {"both": 4, "first": 4, "second": 1, "swapped": 4, "joined": 4, "nowhere": 1}
        wanted = sum(sizes[name] // parts for name, parts in own.items())
        assert wanted <= read <= wanted * 1.3 + OVERHEAD_BYTES
    two.call("load_global", str(spread), (2, 2))
    worker.load_global(str(spread), (2, 4))


def test_two_processes_write_what_four_and_one_load(
    four: Cluster, two: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    two.call("save_global", str(path), (2, 2))
    two.call("finalize", str(path))
    four.call("load_global", str(path), (2, 4))
    worker.load_global(str(path), (8, 1))


def test_global_arrays_are_read_by_orbax_where_they_were_saved(four: Cluster, spread: Path) -> None:
    four.call("load_by_orbax", str(spread))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_global_arrays_are_read_by_every_reader_of_orbax_in_one_process(
    reader: Any, spread: Path
) -> None:
    wanted = worker.global_values()
    mesh = worker.global_mesh((2, 4))
    targets = {
        name: jax.ShapeDtypeStruct(
            value.shape,
            value.dtype,
            sharding=jax.sharding.NamedSharding(mesh, worker.specs()[name]),
        )
        for name, value in wanted.items()
    }
    jax.tree.map(np.testing.assert_array_equal, reader(spread, targets), wanted)


def test_global_arrays_are_safe_once_their_save_has_been_issued(
    four: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    four.call("save_global_async", str(path), (4, 2))
    four.call("finalize", str(path))
    worker.load_global(str(path), (4, 2))


def test_global_arrays_are_replaced_by_all_processes_together(
    four: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    four.call("save_global", str(path), (4, 2), is_stale=True)
    four.call("save_global", str(path), (2, 4), replace=True)
    four.call("finalize", str(path))
    assert fp.verify(path).ok
    worker.load_global(str(path), (4, 2))


def test_each_process_shares_with_an_earlier_checkpoint_what_it_saved_itself(
    four: Cluster, two: Cluster, tmp_path: Path
) -> None:
    frozen, (first, second, third) = worker.frozen_value(), (tmp_path / name for name in "123")
    assert four.call("save_frozen", str(first), (4, 2)) == [0, 0, 0, 0]
    four.call("finalize", str(first))
    reused = four.call("save_frozen", str(second), (4, 2), reuse=str(first))
    assert reused == [frozen.nbytes // 4] * 4
    four.call("finalize", str(second))
    # Of other boxes each finds some in its own file and some in another's: it writes them.
    assert two.call("save_frozen", str(third), (2, 2), reuse=str(second)) == [0, 0]
    two.call("finalize", str(third))
    shutil.rmtree(first)
    for path in (second, third):
        assert fp.verify(path).ok
        assert np.array_equal(fp.load(path)["frozen"], frozen)


def test_keys_spread_over_processes_come_back(two: Cluster, four: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "c"
    four.call("save_keys", str(path))
    four.call("finalize", str(path))
    two.call("load_keys", str(path))
    worker.load_keys(str(path))


# Stacked leaves.

ROWS_BY_PROCESS = {  # of four, with the mesh (4, 2): rows of "layers", cells of "pipeline"
    "rows by process": [(2, 3)] * 4,
    "and rows sharded": [(4, 6)] * 4,  # a box for each device
    "rows over all": [(16, 24)] * 4,
    "all rows in the first": [(8, 12), (0, 0), (0, 0), (0, 0)],
}


@pytest.mark.parametrize("budget", [None, 9000], ids=["", "bounded"])
@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_each_process_saves_what_it_holds_of_each_row_of_a_stacked_leaf(
    four: Cluster, two: Cluster, tmp_path: Path, layout: str, budget: int | None
) -> None:
    groups = four.call("train_stacked", str(tmp_path), layout, (4, 2), budget=budget)
    path = tmp_path / "1"
    boxes = written_boxes(path)
    assert len({box[:2] for box in boxes if "step" not in box[0]}) == sum(
        map(sum, ROWS_BY_PROCESS[layout])
    )
    for process, wanted in enumerate(ROWS_BY_PROCESS[layout]):
        names = [name for name, _, writer in boxes if writer == process]
        found = tuple(names.count(f"params.{name}") for name in ("layers", "pipeline"))
        assert found == wanted
    if layout == "rows by process":
        cells = [f"params.pipeline.{repeat}.3" for repeat in range(worker.REPEATS)]
        assert groups[3] == ("params.layers.6", "params.layers.7", *cells)
    assert fp.verify(path).ok
    (said,) = fp.metadata(path).custom_metadata["session"]["expected"].values()
    assert sorted(said) == ["0", "1", "2", "3"]  # also who has nothing to save says that it is done
    two.call("load_stacked", str(path), "rows over all", (2, 2))
    loaded = ocp.load(path, _stacked_target())
    for name, value in worker.stacked_values().items():
        np.testing.assert_array_equal(loaded["params"][name], value)


def _stacked_target() -> Any:
    mesh = worker.global_mesh((4, 2))
    spec = jax.sharding.PartitionSpec(None, "x")
    sharding = jax.sharding.NamedSharding(mesh, spec)
    params = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        for name, value in worker.stacked_values().items()
    }
    return {"params": params}


def test_two_processes_save_stacked_leaves_that_four_load_and_orbax_as_they_were(
    two: Cluster, four: Cluster, tmp_path: Path
) -> None:
    two.call("train_stacked", str(tmp_path), "and rows sharded", (2, 2), budget=9000)
    four.call("load_stacked", str(tmp_path / "1"), "rows by process", (4, 2))
    two.call("load_stacked_by_orbax", str(tmp_path / "1"), "and rows sharded")


@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_slices_that_all_processes_share_are_saved_in_any_order(
    four: Cluster, tmp_path: Path, layout: str
) -> None:
    path = tmp_path / "c"
    four.call("save_stacked_slices", str(path), layout, (4, 2))
    four.call("finalize", str(path))
    assert fp.verify(path).ok
    worker.load_stacked(str(path), layout, (2, 4))


def test_rows_come_from_processes_that_have_nothing_else_in_common(
    three: Cluster, loose: Cluster, tmp_path: Path
) -> None:
    shares = ([0, 1, 2, 3], [3]), ([], [0, 1]), ([4], [2])
    for cluster in (three, loose):
        path = tmp_path / f"c{cluster is three}"
        for index, share in enumerate(shares):
            cluster.call("save_own_slices", str(path), *share, on=[index])
        names = ["params.layers", "params.pipeline"]
        if cluster is three:
            errors = three.errors("finalize", str(path))
            assert [type(error) for error in errors] == [fp.IncompleteCheckpointError] * 3
        begun = cluster.start("finalize", str(path), expect=names, timeout_secs=30, on=[0])
        cluster.call("save_own_slices", str(path), [5, 6, 7], [], on=[1])
        assert gather(begun) == [names]
        worker.load_stacked(str(path), "rows by process", (4, 2))


# Agreement.


def test_process_that_does_not_come_is_named_and_a_retry_works(
    three: Cluster, tmp_path: Path
) -> None:
    path = str(tmp_path / "c")
    three.call("save", path, {"w": 1})
    begun = three.start("finalize", path, on=[0, 2], timeout_secs=1.0)
    errors: list[Any] = []
    assert seconds(lambda: errors.extend(errors_of(begun))) < 3
    late = three.errors("finalize", path, on=[1])  # it learns what came of it, at once
    assert [type(error) for error in errors + late] == [fp.IncompleteCheckpointError] * 3
    assert all("[1]" in str(error) for error in errors + late)
    assert three.call("finalize", path) == [["w"]] * 3


def test_primary_that_comes_too_late_does_not_act_for_those_who_gave_up(
    three: Cluster, tmp_path: Path
) -> None:
    path = str(tmp_path / "c")
    three.call("save", path, {"w": 1})
    errors = three.errors("finalize", path, on=[1, 2], timeout_secs=0.5)
    assert all("[0]" in str(error) for error in errors)
    errors += three.errors("finalize", path, on=[0])
    assert [type(error) for error in errors] == [fp.IncompleteCheckpointError] * 3
    assert "given up" in str(errors[-1])
    assert not Path(path).exists()
    assert three.call("finalize", path) == [["w"]] * 3


def test_process_that_comes_late_is_waited_for(three: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    begun = three.start("finalize", path, on=[0, 1], timeout_secs=30)
    three.call("sleep", 0.5, on=[2])
    three.call("save", path, {"w": 1}, on=[2])
    begun |= three.start("finalize", path, on=[2])
    assert gather(begun) == [["w"]] * 3


def test_failure_of_the_primary_reaches_all_as_the_same_error(
    three: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    three.call("save", str(path), {"w": 1})
    in_the_way = tmp_path / "c.partial_save" / "state" / "_METADATA"
    in_the_way.mkdir()
    errors = three.errors("finalize", str(path))
    assert [type(error) for error in errors] == [IsADirectoryError] * 3
    in_the_way.rmdir()
    path.mkdir()
    errors = three.errors("finalize", str(path))
    assert [type(error) for error in errors] == [fp.CheckpointExistsError] * 3
    path.rmdir()
    assert three.call("finalize", str(path)) == [["w"]] * 3


def test_failed_save_of_one_process_reaches_all(three: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    three.call("save", path, {"w": 1})
    three.call("save_past_the_limit", path, on=[2])
    errors = three.errors("finalize", path)
    assert [type(error) for error in errors] == [type(errors[2])] * 3
    assert isinstance(errors[2], OSError)
    assert all("process 2" in str(error) for error in errors[:2])
    assert three.call("finalize", path) == [["w"]] * 3


def test_what_each_process_expects_has_to_be_there(three: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    three.call("save", path, {"w": 1})
    begun = {}
    for i, process in enumerate(three.processes):
        begun[i] = process.call("finalize", path, expect=["w", f"v{i}"], processes=[0, 1, 2])
    errors = errors_of(begun)
    assert [type(error) for error in errors] == [fp.IncompleteCheckpointError] * 3
    assert all(name in str(error) for error in errors for name in ("v0", "v1", "v2"))
    three.call("save", path, {"v0": 0, "v1": 1, "v2": 2}, on=[1])
    assert three.call("finalize", path, expect=["v1"], processes=[0, 1, 2])[2] == [
        *("v0", "v1", "v2", "w")
    ]


def test_primary_alone_finalizes_what_it_expects_of_others(three: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    begun = three.start("finalize", path, on=[0], expect=["a", "b"], timeout_secs=30)
    three.call("save", path, {"a": 1}, on=[1])
    three.call("sleep", 0.3, on=[2])
    three.call("save", path, {"b": 1}, on=[2])
    assert gather(begun) == [["a", "b"]]


def test_some_processes_make_a_checkpoint_of_their_own(four: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    four.call("save", path, {"w": 1}, on=[1, 3])
    assert four.call("finalize", path, processes=[3, 1], on=[1, 3]) == [["w"]] * 2
    four.call("save", path + "2", {"w": 1}, on=[2])
    assert four.call("finalize", path + "2", processes=[2], on=[2]) == [["w"]]
    (error,) = four.errors("finalize", path, processes=[0], on=[2])
    assert isinstance(error, ValueError)


def test_two_checkpoints_are_finalized_in_the_background_of_training(
    four: Cluster, tmp_path: Path
) -> None:
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        four.call("save_global", path, (4, 2))
    for i, process in enumerate(four.processes):
        for path in paths if i % 2 else paths[::-1]:  # each in an order of its own
            process.call("begin_finalize", path)
    assert len(set(four.call("train", 50))) == 1
    third = str(tmp_path / "c")
    four.call("save_global", third, (2, 4))
    for path in paths:
        assert four.call("end_finalize", path) == [sorted(worker.specs())] * 4
    four.call("finalize", third)
    for path in (*paths, third):
        worker.load_global(path, (4, 2))


def test_finalize_in_the_background_waits_and_training_does_not(
    four: Cluster, tmp_path: Path
) -> None:
    path = str(tmp_path / "c")
    four.call("save", path, {"w": 1})
    four.call("begin_finalize", path, on=[0, 1, 2])
    four.call("train", 5)
    assert four.call("is_finalized", path, on=[0, 1, 2]) == [False] * 3
    four.call("begin_finalize", path, on=[3])
    assert four.call("end_finalize", path) == [["w"]] * 4


def test_two_threads_of_each_process_finalize_side_by_side(three: Cluster, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        three.call("save", path, {"w": 1})
    assert three.call("finalize_in_threads", paths) == [[["w"]] * 3] * 3


def test_path_can_be_used_again(three: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "c"
    for name in "uvw":
        three.call("save", str(path), {name: 1})
        assert three.call("finalize", str(path)) == [[name]] * 3
        shutil.rmtree(path)


@pytest.mark.parametrize("is_waited_for", [False, True], ids=["before", "while"])
def test_primary_that_freezes_with_the_coordination_service_holds_nobody_up(
    three: Cluster, tmp_path: Path, *, is_waited_for: bool
) -> None:
    path = str(tmp_path / "c")
    three.call("save", path, {"w": 1})
    if is_waited_for:
        begun = three.start("finalize", path, on=[1, 2], timeout_secs=2)
        three.call("sleep", 0.5, on=[0])
    three.processes[0].freeze()
    try:
        if not is_waited_for:
            begun = three.start("finalize", path, on=[1, 2], timeout_secs=2)
        errors: list[Any] = []
        assert seconds(lambda: errors.extend(errors_of(begun))) < 8
    finally:
        three.processes[0].thaw()
    assert [type(error) for error in errors] == [fp.IncompleteCheckpointError] * 2
    assert all("Process 0 " in str(error) for error in errors)
    (late,) = three.errors("finalize", path, on=[0])
    if late is not None:  # it has learned that the others gave up
        three.call("finalize", path)
    assert fp.verify(path).ok


# The callback, in each process one.


def test_callbacks_of_all_processes_make_one_run(three: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert three.call("run_loop", str(directory), 3) == [(0, [1, 2, 3])] * 3
    assert fp.steps(directory) == [2, 3]
    assert fp.verify(directory / "3").ok
    layers = [f"params.layer{i}.w" for i in range(3)]
    assert set(fp.metadata(directory / "3").leaves) == {*layers, "progress.step"}
    assert fp.metadata(directory / "3").custom_metadata["metrics"] == {"loss": 0.5}
    assert three.call("run_loop", str(directory), 5) == [(3, [4, 5])] * 3


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("pause_secs", [0.0, 0.5], ids=["", "in the middle of a step"])
def test_save_that_fails_in_one_process_gives_the_checkpoint_up_in_all(
    three: Cluster, tmp_path: Path, victim: int, pause_secs: float
) -> None:
    directory = tmp_path / "run"
    begun = {
        i: process.call(
            "run_loop", str(directory), 4, failing_step=2 * (i == victim), pause_secs=pause_secs
        )
        for i, process in enumerate(three.processes)
    }
    errors: list[BaseException | None] = []
    assert seconds(lambda: errors.extend(errors_of(begun))) < 10
    assert all(isinstance(error, OSError) for error in errors), errors
    assert len({type(error) for error in errors}) == 1
    assert fp.steps(directory)[0] == 1
    assert 2 not in fp.steps(directory)
    restored = three.call("run_loop", str(directory), 5)
    assert restored[0] == restored[1] == restored[2]
    assert fp.latest(directory) == directory / "5"
    assert not list(directory.glob("*.partial_save"))


# Without jax.distributed.


def test_processes_that_share_a_directory_only_save_and_one_of_them_finalizes(
    loose: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    shares = ([0, 1], [2, 3], [4])
    expect = [f"params.blocks.{number}" for number in range(5)]
    begun = loose.start("finalize", str(path), expect=expect, timeout_secs=30, on=[0])
    for index in (1, 2):
        loose.call("save_stage", str(path), shares[index], count=None, on=[index])
    worker.save_stage(str(path), shares[0])  # and the test is one more
    (names,) = gather(begun)
    assert len(names) == 11
    worker.load_stage(str(path), range(5))


def test_what_such_processes_lack_is_named_and_nothing_is_lost(
    loose: Cluster, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    loose.call("save_stage", str(path), [0], on=[0])
    loose.call("save_stage", str(path), [1], count=None, on=[1])
    (error,) = loose.errors(
        "finalize", str(path), expect=["params/blocks/2"], timeout_secs=0.3, on=[0]
    )
    assert isinstance(error, fp.IncompleteCheckpointError)
    assert "params/blocks/2" in str(error)
    loose.call("save_stage", str(path), [2], count=None, on=[2])
    loose.call("finalize", str(path), expect=["params/blocks/2"], on=[1])
    worker.load_stage(str(path), range(3))


@pytest.mark.parametrize("replace", [False, True], ids=["", "again"])
def test_tree_whose_arrays_live_on_one_process_each_is_saved_once_by_all(
    two: Cluster, tmp_path: Path, *, replace: bool
) -> None:
    path = str(tmp_path / "c")
    for _ in range(1 + replace):
        assert two.call("save_of_each_process", path, replace=replace) == [40, 32]
    two.call("finalize", path)
    assert two.call("load_of_each_process", path) == [[2, 0], [0, 2]]
    loaded = fp.load(path)
    assert loaded.keys() == {"stage0", "stage1", "step"}
    np.testing.assert_array_equal(loaded["stage1"], np.arange(8.0) + 100)


def test_array_that_its_own_process_did_not_save_is_missing(two: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    assert two.processes[0].call("save_of_each_process", path).result() == 40
    with pytest.raises(fp.IncompleteCheckpointError, match="stage1"):
        two.processes[0].call("finalize", path, processes=[0]).result()
