"""Real processes, two devices each, make one checkpoint: stages, global arrays, agreement."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cluster_worker as worker
import jax
import mpmd
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from cluster import Cluster, errors_of, gather, running, start_each
from orbax_side import READERS, STEP
from spread import assert_loaded, sharded
from things import targets

import flax_partial as fp

FOUR = ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11])  # layers of each of four stages
LAYER_BYTES = sum(value.nbytes for value in worker.layer(0).values())
OVERHEAD_BYTES = 400_000  # of any load: table of contents, manifest, B-tree nodes (some repeatedly)


def _cluster(name: str, count: int, **how: Any) -> Any:
    """A fixture: so many processes, for all tests of this module."""

    @pytest.fixture(scope="module", name=name)
    def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
        with running(count, tmp_path_factory.mktemp(name), **how) as cluster:
            yield cluster

    return start


four, three, two = (_cluster(name, n) for name, n in (("four", 4), ("three", 3), ("two", 2)))
loose = _cluster("loose", 3, is_distributed=False)  # they share nothing but the file system


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


def assert_all(errors: Sequence[BaseException | None], kind: type[Exception], *said: str) -> None:
    """Every process raises the same, which says so."""
    assert [type(error) for error in errors] == [kind] * len(errors), errors
    assert all(text in str(error) for error in errors for text in said), errors


def each(*what: Any, **options: Any) -> list[Any]:
    """What comes of `start_each`."""
    return gather(start_each(*what, **options))


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
    four.call("finalize", path)
    return path


def test_stages_save_at_different_times_and_running_different_programs(
    four: Cluster, path: Path
) -> None:
    for index in (2, 0, 3, 1):  # each alone: a hidden collective would wait for the others
        shares = FOUR[index][: index + 1]  # and not even as many saves in each
        four.call("save_stage", path, shares, on=[index])
        assert fp.status(path).processes[-1] <= 3
    assert fp.status(path).processes == (0, 1, 2, 3)
    names = four.call("finalize", path)
    assert all(one == names[0] for one in names)
    numbers = [0, 3, 4, 6, 7, 8, 9, 10, 11]
    assert worker.load_stage(path, numbers) > 0
    assert set(names[0]) == {
        "opt_state.count",
        *(f"params.blocks.{number}.{kind}" for number in numbers for kind in ("bias", "kernel")),
    }


def test_what_every_stage_owns_is_stored_once(four: Cluster, path: Path) -> None:
    each(four, "save_stage", path, FOUR)
    boxes = written_boxes(path.with_name("c.partial_save"))
    assert [box[0] for box in boxes].count("opt_state.count") == 4
    four.call("finalize", path)
    assert fp.metadata(path).leaves["opt_state.count"].bytes == 4
    assert fp.verify(path).ok


def test_stages_that_differ_on_what_they_share_are_told_so_everywhere(
    four: Cluster, path: Path
) -> None:
    for index, numbers in enumerate(FOUR):
        four.call("save_stage", path, numbers, count=7 + index // 3, on=[index])
    assert_all(four.errors("finalize", path), fp.KeyConflictError, "opt_state.count")
    four.call("save_stage", path, FOUR[3], count=7, replace=True, on=[3])
    for index in range(3):  # a new generation, from all: the others' older one does not count
        four.call("save_stage", path, FOUR[index], count=7, replace=True, on=[index])
    four.call("finalize", path)
    assert worker.load_stage(path, range(12)) > 0


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
    worker.load_stage(stages, range(12))
    assert_all_layers(fp.load(stages))


def test_four_stages_are_read_by_orbax(stages: Path) -> None:
    loaded = ocp.load(stages)
    assert_all_layers(loaded)
    assert int(loaded["opt_state"]["count"]) == 7


def assert_all_layers(state: Any) -> None:
    wanted = {str(number): worker.layer(number) for number in range(12)}
    jax.tree.map(np.testing.assert_array_equal, state["params"]["blocks"], wanted)


def test_saves_in_the_background_hold_what_was_handed_over(four: Cluster, path: Path) -> None:
    each(four, "save_stage_async", path, FOUR)
    four.call("finalize", path)  # it waits for them, in every process
    assert_all_layers(fp.load(path))


# Global arrays.


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1)], ids=str)
def test_box_of_a_global_array_is_written_once(
    four: Cluster, path: Path, shape: tuple[int, int]
) -> None:
    four.call("save_global", path, shape)
    boxes = written_boxes(path.with_name("c.partial_save"))
    assert len({box[:2] for box in boxes}) == len(boxes)
    x, y = shape
    shards = {"both": x * y, "first": x, "second": y, "swapped": x * y, "joined": 8, "nowhere": 1}
    counted = {name: sum(box[0] == name for box in boxes) for name in shards}
    assert counted == shards
    assert {box[2] for box in boxes if box[0] == "joined"} == {0, 1, 2, 3}
    four.call("finalize", path)
    assert fp.verify(path).ok
    total = sum(value.nbytes for value in worker.global_values().values())
    assert fp.metadata(path).bytes == total
    stored = sum(file.stat().st_size for file in path.glob("state/part.*/data"))
    assert total <= stored < total * 1.1


@pytest.fixture(scope="module")
def spread(four: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of arrays that are spread over four processes."""
    path = tmp_path_factory.mktemp("spread") / str(STEP)
    four.call("save_global", path, (4, 2))
    four.call("finalize", path)
    return path


def test_global_arrays_load_onto_other_meshes_reading_what_each_process_holds(
    four: Cluster, two: Cluster, spread: Path
) -> None:
    sizes = {name: value.nbytes for name, value in worker.global_values().items()}
    for read in four.call("load_global", spread, (8, 1), is_reversed=True):
        own = {"both": 4, "first": 4, "second": 1, "swapped": 4, "joined": 4, "nowhere": 1}
        wanted = sum(sizes[name] // parts for name, parts in own.items())
        assert wanted <= read <= wanted * 1.3 + OVERHEAD_BYTES
    two.call("load_global", spread, (2, 2))
    worker.load_global(spread, (2, 4))


GLOBAL_SAVES: dict[str, tuple[str, list[tuple[str, tuple[int, int], dict[str, Any]]]]] = {
    "by two processes": ("two", [("save_global", (2, 2), {})]),
    "and donated at once": ("four", [("save_global_async", (4, 2), {})]),
    "and replaced by all together": (
        "four",
        [("save_global", (4, 2), {"is_stale": True}), ("save_global", (2, 4), {"replace": True})],
    ),
}


@pytest.mark.parametrize(("by", "saves"), GLOBAL_SAVES.values(), ids=GLOBAL_SAVES)
def test_global_arrays_are_saved(
    by: str, saves: Any, four: Cluster, two: Cluster, path: Path
) -> None:
    cluster = {"four": four, "two": two}[by]
    for name, shape, options in saves:
        cluster.call(name, path, shape, **options)
    cluster.call("finalize", path)
    assert fp.verify(path).ok
    four.call("load_global", path, (2, 4))
    worker.load_global(path, (8, 1))


def test_global_arrays_are_read_by_orbax_where_they_were_saved(four: Cluster, spread: Path) -> None:
    four.call("load_by_orbax", spread, (4, 2))


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_global_arrays_are_read_by_every_reader_of_orbax_in_one_process(
    reader: Any, spread: Path
) -> None:
    wanted = worker.global_values()
    shardings = sharded(worker.global_mesh((2, 4)), worker.specs())
    assert_loaded(reader(spread, targets(wanted, shardings)), shardings, wanted)


def test_each_process_shares_with_an_earlier_checkpoint_what_it_saved_itself(
    four: Cluster, two: Cluster, tmp_path: Path
) -> None:
    frozen, (first, second, third) = worker.frozen_value(), (tmp_path / name for name in "123")
    assert four.call("save_frozen", first, (4, 2)) == [0, 0, 0, 0]
    four.call("finalize", first)
    reused = four.call("save_frozen", second, (4, 2), reuse=first)
    assert reused == [frozen.nbytes // 4] * 4
    four.call("finalize", second)
    # Of other boxes each finds some in its own file and some in another's: it writes them.
    assert two.call("save_frozen", third, (2, 2), reuse=second) == [0, 0]
    two.call("finalize", third)
    shutil.rmtree(first)
    for path in (second, third):
        assert fp.verify(path).ok
        assert np.array_equal(fp.load(path)["frozen"], frozen)


def test_keys_spread_over_processes_come_back(two: Cluster, four: Cluster, path: Path) -> None:
    four.call("save_keys", path)
    four.call("finalize", path)
    two.call("load_keys", path)
    worker.load_keys(path)


# Stacked leaves.

ROWS_BY_PROCESS = {  # of four, with the mesh (4, 2): rows of "layers", cells of "pipeline"
    "rows by process": [(2, 3)] * 4,
    "and rows sharded": [(4, 6)] * 4,  # a box for each device
    "rows over all": [(16, 24)] * 4,
    "rows replicated": [(2, 3)] * 4,  # they take turns
}


@pytest.mark.parametrize("budget", [None, 9000], ids=["", "bounded"])
@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_each_process_saves_what_it_holds_of_each_row_of_a_stacked_leaf(
    four: Cluster, two: Cluster, tmp_path: Path, layout: str, budget: int | None
) -> None:
    groups = four.call("train_stacked", tmp_path, layout, (4, 2), budget=budget)
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
    (said,) = fp.metadata(path).training["session"]["expected"].values()
    assert sorted(said) == ["0", "1", "2", "3"]  # also who has nothing to save says that it is done
    two.call("load_stacked", path, "rows over all", (2, 2))
    values = worker.stacked_values()
    spec = jax.sharding.PartitionSpec(None, "x")
    shardings = sharded(worker.global_mesh((4, 2)), dict.fromkeys(values, spec))
    loaded = ocp.load(path, {"params": targets(values, shardings)})
    assert_loaded(loaded["params"], shardings, values)


def test_two_processes_save_stacked_leaves_that_four_load_and_orbax_as_they_were(
    two: Cluster, four: Cluster, tmp_path: Path
) -> None:
    two.call("train_stacked", tmp_path, "and rows sharded", (2, 2), budget=9000)
    four.call("load_stacked", tmp_path / "1", "rows by process", (4, 2))
    two.call("load_stacked_by_orbax", tmp_path / "1", "and rows sharded", (2, 2))


@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_slices_that_all_processes_share_are_saved_in_any_order(
    four: Cluster, path: Path, layout: str
) -> None:
    four.call("save_stacked_slices", path, layout, (4, 2))
    four.call("finalize", path)
    assert fp.verify(path).ok
    worker.load_stacked(path, layout, (2, 4))


def test_rows_come_from_processes_that_have_nothing_else_in_common(
    three: Cluster, loose: Cluster, tmp_path: Path
) -> None:
    shares = ([0, 1, 2, 3], [3]), ([], [0, 1]), ([4], [2])
    for cluster in (three, loose):
        path = tmp_path / f"c{cluster is three}"
        for index, share in enumerate(shares):
            cluster.call("save_own_slices", path, *share, on=[index])
        names = ["params.layers", "params.pipeline"]
        if cluster is three:
            assert_all(three.errors("finalize", path), fp.IncompleteCheckpointError)
        begun = cluster.start("finalize", path, expect=names, timeout_secs=30, on=[0])
        cluster.call("save_own_slices", path, [5, 6, 7], [], on=[1])
        assert gather(begun) == [names]
        worker.load_stacked(path, "rows by process", (4, 2))


def test_each_process_reads_its_own_layers_only_of_a_stack_that_is_another_there(
    four: Cluster, path: Path
) -> None:
    values = worker.restacked_values()
    for at in range(worker.LAYERS):
        row = {"layers": fp.Slice(values[at : at + 1], at, worker.LAYERS)}
        fp.save(path, row, options=worker.QUICK)
    fp.finalize(path)
    for read in four.call("load_restacked", path):
        assert values.nbytes // 4 <= read <= values.nbytes // 4 + OVERHEAD_BYTES


# Agreement.


def test_process_that_does_not_come_is_named_and_a_retry_works(three: Cluster, path: Path) -> None:
    three.call("save", path, {"w": 1})
    begun = three.start("finalize", path, on=[0, 2], timeout_secs=1.0)
    errors = errors_of(begun)  # which waits for less than the processes would by themselves
    errors += three.errors("finalize", path, on=[1])  # it learns what came of it, at once
    assert_all(errors, fp.IncompleteCheckpointError, "[1]")
    assert three.call("finalize", path) == [["w"]] * 3


def test_primary_that_comes_too_late_does_not_act_for_those_who_gave_up(
    three: Cluster, path: Path
) -> None:
    three.call("save", path, {"w": 1})
    errors = three.errors("finalize", path, on=[1, 2], timeout_secs=0.5)
    assert_all(errors, fp.IncompleteCheckpointError, "[0]")
    errors = three.errors("finalize", path, on=[0])
    assert_all(errors, fp.IncompleteCheckpointError, "given up")
    assert not path.exists()
    assert three.call("finalize", path) == [["w"]] * 3


def test_process_that_comes_late_is_waited_for(three: Cluster, path: Path) -> None:
    begun = three.start("finalize", path, on=[0, 1], timeout_secs=30)
    three.call("sleep", 0.5, on=[2])
    three.call("save", path, {"w": 1}, on=[2])
    begun |= three.start("finalize", path, on=[2])
    assert gather(begun) == [["w"]] * 3


def test_failure_of_the_primary_reaches_all_as_the_same_error(three: Cluster, path: Path) -> None:
    three.call("save", path, {"w": 1})
    in_the_way = path.with_name("c.partial_save") / "state" / "_METADATA"
    in_the_way.mkdir()
    assert_all(three.errors("finalize", path), IsADirectoryError)
    in_the_way.rmdir()
    path.mkdir()
    assert_all(three.errors("finalize", path), fp.CheckpointExistsError)
    path.rmdir()
    assert three.call("finalize", path) == [["w"]] * 3


def test_failed_save_of_one_process_reaches_all(three: Cluster, path: Path) -> None:
    three.call("save", path, {"w": 1})
    three.call("save_past_the_limit", path, on=[2])
    errors = three.errors("finalize", path)
    assert isinstance(errors[2], OSError)
    assert_all(errors, type(errors[2]))
    assert all("process 2" in str(error) for error in errors[:2])
    assert three.call("finalize", path) == [["w"]] * 3


def test_what_each_process_expects_has_to_be_there(three: Cluster, path: Path) -> None:
    three.call("save", path, {"w": 1})
    expected = [["w", f"v{i}"] for i in range(3)]
    begun = start_each(three, "finalize_expecting", path, expected, processes=[0, 1, 2])
    assert_all(errors_of(begun), fp.IncompleteCheckpointError, "v0", "v1", "v2")
    three.call("save", path, {"v0": 0, "v1": 1, "v2": 2}, on=[1])
    names = three.call("finalize", path, expect=["v1"], processes=[0, 1, 2])
    assert names == [["v0", "v1", "v2", "w"]] * 3


def test_primary_alone_finalizes_what_it_expects_of_others(three: Cluster, path: Path) -> None:
    begun = three.start("finalize", path, on=[0], expect=["a", "b"], timeout_secs=30)
    three.call("save", path, {"a": 1}, on=[1])
    three.call("sleep", 0.3, on=[2])
    three.call("save", path, {"b": 1}, on=[2])
    assert gather(begun) == [["a", "b"]]


def test_some_processes_make_a_checkpoint_of_their_own(four: Cluster, path: Path) -> None:
    four.call("save", path, {"w": 1}, on=[1, 3])
    assert four.call("finalize", path, processes=[3, 1], on=[1, 3]) == [["w"]] * 2
    own = path.with_name("own")
    four.call("save", own, {"w": 1}, on=[2])
    assert four.call("finalize", own, processes=[2], on=[2]) == [["w"]]
    (error,) = four.errors("finalize", path, processes=[0], on=[2])
    assert isinstance(error, ValueError)


def test_two_checkpoints_are_finalized_in_the_background_of_training(
    four: Cluster, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        four.call("save_global", path, (4, 2))
    for i, process in enumerate(four.processes):
        for path in paths if i % 2 else paths[::-1]:  # each in an order of its own
            process.call("begin_finalize", path)
    assert len(set(four.call("train", 50))) == 1
    third = tmp_path / "c"
    four.call("save_global", third, (2, 4))
    for path in paths:
        assert four.call("end_finalize", path) == [sorted(worker.specs())] * 4
    four.call("finalize", third)
    for path in (*paths, third):
        worker.load_global(path, (4, 2))


def test_finalize_in_the_background_waits_and_training_does_not(four: Cluster, path: Path) -> None:
    four.call("save", path, {"w": 1})
    four.call("begin_finalize", path, on=[0, 1, 2])
    four.call("train", 5)
    assert four.call("is_finalized", path, on=[0, 1, 2]) == [False] * 3
    four.call("begin_finalize", path, on=[3])
    assert four.call("end_finalize", path) == [["w"]] * 4


def test_two_threads_of_each_process_finalize_side_by_side(three: Cluster, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        three.call("save", path, {"w": 1})
    assert three.call("finalize_in_threads", paths) == [[["w"]] * 3] * 3


def test_path_can_be_used_again(three: Cluster, path: Path) -> None:
    for name in "uvw":
        three.call("save", path, {name: 1})
        assert three.call("finalize", path) == [[name]] * 3
        shutil.rmtree(path)


@pytest.mark.parametrize("is_waited_for", [False, True], ids=["before", "while"])
def test_primary_that_freezes_with_the_coordination_service_holds_nobody_up(
    three: Cluster, path: Path, *, is_waited_for: bool
) -> None:
    three.call("save", path, {"w": 1})
    if is_waited_for:
        begun = three.start("finalize", path, on=[1, 2], timeout_secs=2)
        three.call("sleep", 0.5, on=[0])
    three.processes[0].send(signal.SIGSTOP)
    try:
        if not is_waited_for:
            begun = three.start("finalize", path, on=[1, 2], timeout_secs=2)
        errors = errors_of(begun)
    finally:
        three.processes[0].send(signal.SIGCONT)
    assert_all(errors, fp.IncompleteCheckpointError, "Process 0 ")
    (late,) = three.errors("finalize", path, on=[0])
    if late is not None:  # it has learned that the others gave up
        three.call("finalize", path)
    assert fp.verify(path).ok


# The callback, in each process one.


def test_callbacks_of_all_processes_make_one_run(three: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert three.call("run_loop", directory, steps=3) == [(0, [1, 2, 3])] * 3
    assert fp.steps(directory) == [2, 3]
    assert fp.verify(directory / "3").ok
    layers = [f"params.layer{i}.w" for i in range(3)]
    assert set(fp.metadata(directory / "3").leaves) == {*layers, "progress.step"}
    assert fp.metadata(directory / "3").custom_metadata["metrics"] == {"loss": 0.5}
    assert three.call("run_loop", directory, steps=5) == [(3, [4, 5])] * 3


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("pause_secs", [0.0, 0.5], ids=["", "in the middle of a step"])
def test_save_that_fails_in_one_process_gives_the_checkpoint_up_in_all(
    three: Cluster, tmp_path: Path, victim: int, pause_secs: float
) -> None:
    directory = tmp_path / "run"
    failing_steps = [2 * (i == victim) for i in range(3)]
    errors = errors_of(
        start_each(three, "run_loop", directory, failing_steps, pause_secs=pause_secs)
    )
    assert isinstance(errors[0], OSError)
    assert_all(errors, type(errors[0]))
    assert fp.steps(directory)[0] == 1
    assert 2 not in fp.steps(directory)
    restored = three.call("run_loop", directory, steps=5)
    assert restored == [restored[0]] * 3
    assert fp.latest(directory) == directory / "5"
    assert not list(directory.glob("*.partial_save"))


# Without jax.distributed.


def test_processes_that_share_a_directory_only_save_and_one_of_them_finalizes(
    loose: Cluster, path: Path
) -> None:
    shares = ([0, 1], [2, 3], [4])
    expect = [f"params.blocks.{number}" for number in range(5)]
    begun = loose.start("finalize", path, expect=expect, timeout_secs=30, on=[0])
    for index in (1, 2):
        loose.call("save_stage", path, shares[index], count=None, on=[index])
    worker.save_stage(path, shares[0])  # and the test is one more
    (names,) = gather(begun)
    assert len(names) == 11
    worker.load_stage(path, range(5))


def test_what_such_processes_lack_is_named_and_nothing_is_lost(loose: Cluster, path: Path) -> None:
    loose.call("save_stage", path, [0], on=[0])
    loose.call("save_stage", path, [1], count=None, on=[1])
    expect = ["params/blocks/2"]
    errors = loose.errors("finalize", path, expect=expect, timeout_secs=0.3, on=[0])
    assert_all(errors, fp.IncompleteCheckpointError, *expect)
    loose.call("save_stage", path, [2], count=None, on=[2])
    loose.call("finalize", path, expect=expect, on=[1])
    worker.load_stage(path, range(3))


@pytest.mark.parametrize("replace", [False, True], ids=["", "again"])
def test_tree_whose_arrays_live_on_one_process_each_is_saved_once_by_all(
    two: Cluster, tmp_path: Path, *, replace: bool
) -> None:
    path = tmp_path / "c"
    for _ in range(1 + replace):
        assert two.call("save_of_each_process", path, replace=replace) == [40, 32]
    two.call("finalize", path)
    assert two.call("load_of_each_process", path) == [[2, 0], [0, 2]]
    loaded = fp.load(path)
    assert loaded.keys() == {"stage0", "stage1", "step"}
    np.testing.assert_array_equal(loaded["stage1"], np.arange(8.0) + 100)


def test_arrays_on_one_device_of_a_process_are_saved_by_that_process(
    two: Cluster, tmp_path: Path
) -> None:
    for name in ("first", "again"):
        path = tmp_path / name
        assert two.call("save_on_one_device_each", path) == [32, 32]
        two.call("finalize", path)
        np.testing.assert_array_equal(fp.load(path)["stage1"], np.arange(8.0) + 100)


def test_array_that_its_own_process_did_not_save_is_missing(two: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "c"
    assert two.processes[0].call("save_of_each_process", path).result() == 40
    with pytest.raises(fp.IncompleteCheckpointError, match="stage1"):
        two.processes[0].call("finalize", path, processes=[0]).result()


# A framework's own arrays, which some stages hold.


def merged(found: Iterable[dict[str, str]]) -> dict[str, str]:
    """What all processes have found."""
    return {name: bits for of_one in found for name, bits in of_one.items()}


@pytest.mark.parametrize("has_callback", [False, True], ids=["", "by the callback"])
def test_arrays_of_stages_are_restored_into_fewer_and_train_on_bit_for_bit(
    four: Cluster, two: Cluster, tmp_path: Path, *, has_callback: bool
) -> None:
    how = {"has_callback": has_callback}
    of_four = four.call("train_stages", tmp_path, 4, **how)
    of_two = two.call("resume_stages", tmp_path, 2, 2, **how)  # and saves its third step
    assert merged(of_two) == merged(third for third, _ in of_four)
    assert len(merged(of_two)) == 1 + 2 * 2 * (1 + 2 * mpmd.LAYERS)
    last = mpmd.resume_stages(tmp_path, 3, 1, **how)
    assert last == merged(fourth for _, fourth in of_four)
    assert fp.verify(tmp_path / "2").ok
