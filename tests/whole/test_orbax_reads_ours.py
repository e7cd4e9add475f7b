"""Every reader of Orbax reads our checkpoints: value, dtype, sharding and structure.

What a table here leaves out is what Orbax itself cannot do; the comments say where.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import orbax_side as side
import pytest
import trees
from hypothesis import assume, given, settings
from jax import tree_util
from orbax.checkpoint.experimental import v1
from things import QUICK, stored

import flax_partial as fp

pytestmark = pytest.mark.usefixtures("wide_types")

# --- what is saved


STATES: dict[str, Callable[[], Any]] = {
    **side.STATES,
    "numpy-scalars": lambda: {name: array[0] for name, array in side.bits((2,)).items()},
    "zero-size": lambda: {"jax": jnp.zeros((0, 3)), "numpy": np.zeros((2, 0, 4), np.int8)},
    "non-finite": lambda: np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324]),
    "last-device": lambda: side.on_device(7),
    "sharded-rows": lambda: side.sharded("x", "x"),
    "sharded-both": lambda: side.sharded("xy", "x", "y"),
    "sharded-columns-only": lambda: side.sharded("xy", None, "y"),
    "sharded-by-two-axes": lambda: side.sharded("xyz", ("x", "z"), "y"),
    "sharded-short-spec": lambda: side.sharded("xyz", "y"),
    "replicated": lambda: side.sharded("xy"),
    "replicated-scalar": lambda: jax.device_put(jnp.int32(4), side.on("xyz")),
    **{f"key-{name}": functools.partial(jax.random.key, 5, impl=name) for name in trees.KEY_IMPLS},
    "keys-sharded": lambda: jax.device_put(
        jax.random.split(jax.random.key(1), 8), side.on("xy", "y")
    ),
    "ints": lambda: [0, -5, 2**63 - 1, -(2**63), 2**63, 2**64 - 1],
    "bools": lambda: [True, False],
    "floats": lambda: [2.5, -0.0, float("inf"), float("nan"), 5e-324],
    "complex": lambda: [1 + 2j, complex("nan")],
    "none": lambda: None,
    "empty-dict": dict,
    "empty-list": list,
    "empty-tuple": tuple,
    "empty-named-tuple": side.Nothing,
    "nested-dicts": lambda: {"a": {"b": {"c": np.ones(2)}, "d": 1}, "z": 2.0},
    "odd-names": lambda: {"a b": 1, "ü/\n": np.ones(1), "..": jnp.ones(2), "c": {"0": 2}, "~": 3},
    "long-list": lambda: [np.full(2, i) for i in range(12)],
    "nested-lists": lambda: [[1, [2.0, []]], {"a": [None]}],
    "tuples": lambda: (1, (jnp.ones(2), ({"a": (2,)},))),
}
# v0's StandardCheckpointer refuses strings, ours and its own, where it is given a target.
STRINGS: dict[str, Callable[[], Any]] = {
    "strings": lambda: ["text", "", "ü\n\0\u2028", "1", "null"],
    "string-names": lambda: {"a.b": "x", "a/b": "y", "a/c/d": "z", "": "w", "0": "v"},
}


# --- all states, by all readers


@pytest.fixture(scope="module", params=[*STATES, *STRINGS])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A case, saved; all readers share it, as none may change it."""
    make = (STATES | STRINGS)[request.param]
    path, state = (
        tmp_path_factory.mktemp(request.param) / str(side.STEP),
        {"x": make(), "y": jnp.ones(2)},
    )
    return stored(path, state).path, state


@pytest.mark.parametrize("reader", side.READERS.values(), ids=side.READERS)
def test_orbax_reads_without_a_target(reader: Any, case: tuple[Path, Any]) -> None:
    path, state = case
    want = side.map_leaves(side.on_first_device, side.as_nested(state))
    side.assert_same(reader(path, None), want)


@pytest.mark.parametrize("reader", side.READERS.values(), ids=side.READERS)
def test_orbax_reads_into_a_target(reader: Any, case: tuple[Path, Any]) -> None:
    path, state = case
    target = side.map_leaves(side.abstract, state)
    if reader is side.read_v0_standard and side.has_strings(target):
        pytest.skip("StandardCheckpointer takes no target with strings")
    side.assert_same(reader(path, target), side.map_leaves(side.as_orbax, state))


@pytest.mark.parametrize("reader", [side.read_v1, side.read_v0_standard, side.read_v0_pytree])
def test_orbax_reshards_into_a_target(reader: Any, tmp_path: Path) -> None:
    path = stored(
        tmp_path / str(side.STEP), {"x": side.sharded("xy", "x", "y"), "y": side.on_device(7)}
    ).path
    want = {
        "x": side.sharded("xyz", "z", ("y", "x")),
        "y": jax.device_put(side.on_device(2), side.on("x")),
    }
    side.assert_same(reader(path, jax.tree.map(side.abstract, want)), want)


# --- what our saves can do, and a save of Orbax cannot

BIG = np.arange(24.0).reshape(6, 4)
SESSIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "three-parts": (
        ({"a": {"x": BIG}}, {"b": [1, "two"]}, {"a": {"y": np.ones(3)}}),
        {"a": {"x": BIG, "y": np.ones(3)}, "b": [1, "two"]},
    ),
    "replaced": (
        ({"a": BIG, "b": 1}, {"a": BIG[:2] + 1}, {"b": "now"}),
        {"a": BIG[:2] + 1, "b": "now"},
    ),
} | {
    name: ([{"a": piece} for piece in pieces], {"a": BIG})
    for name, pieces in {
        "slices": [fp.Slice(BIG[i : i + 2], i, 6) for i in (4, 0, 2)],
        "slices-of-columns": [fp.Slice(BIG[:, i : i + 1], i, 4, axis=1) for i in range(4)],
        "slices-of-both": [
            fp.Slice(BIG[i : i + 2, j : j + 1], (i, j), (6, 4), (0, 1))
            for i, j in itertools.product((4, 0, 2), range(4))
        ],
    }.items()
}
OPTIONS = {
    "plain": QUICK,
    "zstd": fp.SaveOptions(durable=False, compression="zstd"),
    "blosc": fp.SaveOptions(durable=False, compression="blosc"),
    "small-chunks": fp.SaveOptions(durable=False, chunk_bytes=32),
    "no-digests": fp.SaveOptions(durable=False, checksum=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("states", "want"), SESSIONS.values(), ids=SESSIONS)
def test_orbax_reads_what_many_saves_add_up_to(
    states: Any, want: Any, options: fp.SaveOptions, tmp_path: Path
) -> None:
    path = stored(tmp_path / "checkpoint", *states, options=options, replace=True).path
    side.assert_same(v1.load(path), want)
    side.assert_same(side.read_v0_pytree(path, None), want)


def test_data_that_was_lost_is_an_error_for_orbax_and_not_zeros(tmp_path: Path) -> None:
    report = stored(tmp_path / "checkpoint", {"a": np.ones(1000)})
    (report.path / "state" / report.part / "data").unlink()
    with pytest.raises(ValueError, match="a/c/0"):
        v1.load(report.path)


@settings(max_examples=20)
@given(trees.trees)
def test_orbax_reads_any_tree_that_it_can_name(tree: Any) -> None:
    # It finds a string by a JSON pointer, in which "~" begins an escape.
    pointers = [path for path, leaf in trees.flat(tree)[0] if isinstance(leaf, str)]
    assume(not any("~" in tree_util.keystr(path) for path in pointers))
    with tempfile.TemporaryDirectory() as directory:
        path = stored(Path(directory, "checkpoint"), tree).path
        want = side.map_leaves(side.on_first_device, side.as_nested(tree))
        side.assert_same(v1.load(path), want)


ON_ONE_DEVICE = """
import sys, jax, numpy as np
from orbax.checkpoint.experimental import v1

assert jax.device_count() == 1
loaded = v1.load(sys.argv[1])
for number in range(8):
    np.testing.assert_array_equal(loaded[f"on{number}"], np.full(3, number))
"""


def test_orbax_reads_arrays_of_many_devices_where_there_is_one(tmp_path: Path) -> None:
    """As pipeline stages leave them, each on the device of its stage."""
    state = {
        f"on{number}": jax.device_put(np.full(3, number), device)
        for number, device in enumerate(jax.devices())
    }
    path = stored(tmp_path / "checkpoint", state).path
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_DEVICE, path],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


# --- metadata and runs


def test_orbax_describes_our_checkpoint(tmp_path: Path) -> None:
    state = {"x": side.sharded("xy", "x"), "n": np.zeros((2, 3), np.int8), "s": "text", "i": 1}
    fp.save(tmp_path / str(side.STEP), state, custom_metadata={"run": {"lr": 0.1}}, options=QUICK)
    fp.save(
        tmp_path / str(side.STEP), {"z": 2}, custom_metadata={"run": {"seed": 1}}, options=QUICK
    )
    committed = fp.finalize(tmp_path / str(side.STEP))
    described = v1.metadata(tmp_path / str(side.STEP))
    assert described.custom_metadata == {"run": {"lr": 0.1, "seed": 1}}
    assert described.init_timestamp_nsecs / 1e9 == committed.started_at
    assert described.commit_timestamp_nsecs / 1e9 == committed.committed_at
    leaf = described.metadata["x"]
    assert (leaf.shape, leaf.dtype) == ((8, 16), np.float64)
    assert leaf.sharding_metadata.to_jax_sharding() == side.on("xy", "x")
    assert described.metadata["n"].shape == (2, 3)
    with v0.CheckpointManager(tmp_path) as manager:
        assert manager.metadata(side.STEP).custom_metadata == described.custom_metadata


def test_managers_see_finalized_steps_only(tmp_path: Path) -> None:
    for step in (1, 20):
        stored(tmp_path / str(step), {"step": step})
    fp.save(tmp_path / "30", {"step": 30}, options=QUICK)
    with v0.CheckpointManager(tmp_path) as manager:
        assert sorted(manager.all_steps()) == [1, 20]
        assert manager.latest_step() == 20
        assert manager.restore(1)["state"] == {"step": 1}
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [1, 20]
    fp.finalize(tmp_path / "30")
    assert fp.steps(tmp_path) == [1, 20, 30]


def test_a_manager_goes_on_from_our_steps(tmp_path: Path) -> None:
    stored(tmp_path / "1", {"a": np.ones(3)})
    with v0.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=v0.args.StandardSave({"a": np.zeros(3)}))
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [1, 2]
    assert fp.steps(tmp_path) == [1, 2]
    side.assert_same(fp.load(tmp_path / "2"), {"a": np.zeros(3)})
    side.assert_same(fp.load(tmp_path / "1"), {"a": np.ones(3)})


# --- metrics


METRICS = {1: {"loss": 0.5}, 2: {"loss": 0.25, "accuracy": 1}, 3: {"loss": 0.75}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose callback stored metrics; its last step has none."""
    path = tmp_path_factory.mktemp("run")
    for step in (1, 2, 3, 4):
        metrics = {"metrics": METRICS[step]} if step in METRICS else {}
        stored(path / str(step), {"w": np.full(3, step)}, custom_metadata=metrics)
    return path


@contextlib.contextmanager
def best_manager(run: Path, **options: Any) -> Iterator[v0.CheckpointManager]:
    chosen = v0.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["loss"], best_mode="min", **options
    )
    with v0.CheckpointManager(run, options=chosen) as manager:
        yield manager


def test_v0_manager_knows_our_metrics_and_the_best_step(run: Path) -> None:
    with best_manager(run) as manager:
        assert {step: manager.metrics(step) for step in METRICS} == METRICS
        assert manager.metrics(4) is None
        assert manager.best_step() == 2
        assert manager.metadata(2).metrics == METRICS[2]
        assert manager.latest_step() == 4


def test_v0_manager_restores_the_state_beside_metrics(run: Path) -> None:
    want = {"w": np.full(3, 2)}
    standard = v0.args.Composite(state=v0.args.StandardRestore(want))
    for args in (None, standard, v0.args.Composite(state=v0.args.PyTreeRestore(want))):
        with v0.CheckpointManager(run) as manager:
            side.assert_same(manager.restore(2, args=args)["state"], want)
    with v0.CheckpointManager(run) as manager:
        assert manager.restore(2)["metrics"] == METRICS[2]
        assert "metrics" not in manager.restore(4)


def test_v0_manager_keeps_the_best_of_our_steps(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    keep = v0.checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics["loss"],
        reverse=True,
        n=2,
        keep_checkpoints_without_metrics=False,
    )
    with best_manager(tmp_path / "run", preservation_policy=keep) as manager:
        manager.save(5, args=v0.args.Composite(state=v0.args.StandardSave({"w": np.ones(3)})))
    assert fp.steps(tmp_path / "run")[:2] == [1, 2]


def test_v1_reads_a_step_with_metrics(run: Path) -> None:
    want = {"w": np.full(3, 2)}
    side.assert_same(v1.load(run / "2"), want)
    side.assert_same(v1.load(run / "2", want), want)
    assert v1.load_checkpointables(run / "2").keys() == {"state"}
    assert v1.metadata(run / "2").custom_metadata == {"metrics": METRICS[2]}
    with v1.training.Checkpointer(run) as checkpointer:
        found = {one.step: one.metrics for one in checkpointer.checkpoints}
        assert found == {**METRICS, 4: None}
        side.assert_same(checkpointer.load(2), want)


@pytest.mark.parametrize("metrics", [{}, "text", None, [1]])
def test_what_are_no_metrics_is_no_item(metrics: Any, tmp_path: Path) -> None:
    stored(tmp_path / "1", {"w": np.ones(3)}, custom_metadata={"metrics": metrics})
    assert not (tmp_path / "1" / "metrics").exists()
    with v0.CheckpointManager(tmp_path) as manager:
        assert list(manager.restore(1)) == ["state"]


def test_metrics_of_an_attempt_to_finalize_are_made_anew(tmp_path: Path) -> None:
    session = tmp_path / "c.partial_save"
    fp.save(tmp_path / "c", {"a": 1}, custom_metadata={"metrics": {"loss": 1}}, options=QUICK)
    (session / "metrics").mkdir()
    (session / "metrics" / "metrics").write_text("{")
    fp.save(tmp_path / "c", {"b": 1}, custom_metadata={"metrics": {"loss": 2}}, options=QUICK)
    fp.finalize(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "metrics" / "metrics").read_text()) == {"loss": 2}
    assert fp.verify(tmp_path / "c").ok
    (tmp_path / "c" / "metrics" / "metrics").write_text("{}")
    assert list(fp.verify(tmp_path / "c").bad) == ["metrics/metrics"]


def test_directory_of_metrics_that_something_else_made_is_left_alone(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"a": 1}, options=QUICK)
    (tmp_path / "c.partial_save" / "metrics").mkdir()
    (tmp_path / "c.partial_save" / "metrics" / "mine").write_text("precious")
    with pytest.raises(fp.CheckpointExistsError, match="metrics/mine"):
        fp.abort(tmp_path / "c")
    assert (tmp_path / "c.partial_save" / "metrics" / "mine").read_text() == "precious"
