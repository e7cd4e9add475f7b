"""Leaves that stack layers are saved a layer at a time, from their own shards, and are one array.

Every layout is that of a stack over eight devices; what is saved is compared with the same leaf
saved whole, so that it makes no difference to a reader how it was saved.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback
from flax_partial.callbacks._rows import Row
from flax_partial.callbacks._stacked import spread

if TYPE_CHECKING:
    from pathlib import Path

QUICK = fp.SaveOptions(durable=False)
LAYERS = 8

SPECS: dict[str, tuple[tuple[Any, ...], int]] = {
    "[layers, ...] over stages": (("stage",), 0),
    "and its rows over tensor": (("stage", None, "tensor"), 0),
    "over both": ((("stage", "tensor"),), 0),
    "over both, turned round": ((("tensor", "stage"),), 0),
    "[repeats, stages, ...] by stage": ((None, "stage"), 1),
    "[repeats, stages, ...] by repeat": ((None, "stage", "tensor"), 0),
    "replicated": ((), 0),
    "rows over both": ((None, ("stage", "tensor")), 0),
    "last axis": (("tensor", None, "stage"), 2),
}


def mesh_of(kind: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices()).reshape(4, 2)
    return Mesh(devices, ("stage", "tensor"), axis_types=(kind, kind))


def put(array: Any, *spec: Any, kind: AxisType = AxisType.Auto) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh_of(kind), PartitionSpec(*spec)))


def _other_mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))


def numbers(*shape: int) -> jax.Array:
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)  # noqa: PLW2901
        np.testing.assert_array_equal(one, other)


def assert_like_saved_whole(path: Path, leaf: jax.Array) -> None:
    """Finalizes leaf "w", which was saved in rows; for us and Orbax it is as if saved at once."""
    whole = path.with_name("whole")
    fp.save(whole, {"w": leaf}, options=QUICK)
    found, want = (fp.finalize(one).leaves["w"] for one in (path, whole))
    assert (found.shape, found.sharding) == (want.shape, want.sharding)
    np.testing.assert_array_equal(fp.load(path)["w"], leaf)
    restored = ocp.load(path)["w"]
    assert restored.sharding == leaf.sharding
    np.testing.assert_array_equal(restored, leaf)


# Of the engine: rows cut out of shards.


@pytest.mark.parametrize(("spec", "axis"), SPECS.values(), ids=SPECS)
def test_rows_of_any_layout_are_the_leaf_that_a_whole_save_makes(
    tmp_path: Path, spec: tuple[Any, ...], axis: int
) -> None:
    leaf = put(numbers(LAYERS, 8, 8), *spec)
    path, key = tmp_path / "rows", (jax.tree_util.DictKey("w"),)
    rows = [row for _, row in spread([(key, leaf)], {"w": (axis,)})]
    assert [row.start for row in rows] == [(start,) for start in range(8)]
    for row in rows[::-1]:
        fp.save(path, {"w": row.cut()}, options=QUICK)
    assert_like_saved_whole(path, leaf)
    other = NamedSharding(_other_mesh(), PartitionSpec("b"))
    for sharding in (leaf.sharding, other):
        target = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        loaded = fp.load(path, target={"w": target})["w"]
        assert loaded.sharding == sharding
        np.testing.assert_array_equal(loaded, leaf)


@pytest.mark.parametrize(("spec", "axis"), SPECS.values(), ids=SPECS)
def test_row_stays_on_the_devices_that_hold_it_and_is_all_that_is_copied(
    spec: tuple[Any, ...], axis: int
) -> None:
    leaf = put(numbers(LAYERS, 8, 8), *spec)
    for start in range(8):
        row = Row(leaf, (start,), (axis,)).cut().value
        assert row.nbytes * 8 == leaf.nbytes
        assert sum(shard.data.nbytes for shard in row.addressable_shards) == row.nbytes
        for shard in row.addressable_shards:
            (source,) = (one for one in leaf.addressable_shards if one.device == shard.device)
            assert source.replica_id == 0
            assert start in range(*source.index[axis].indices(8))
        np.testing.assert_array_equal(row, np.take(leaf, [start], axis))


def test_rows_of_every_kind_of_dtype_are_cut(tmp_path: Path) -> None:
    leaves = {
        name: put(jnp.asarray(np.arange(32).reshape(8, 4) % 2, name), "stage", "tensor")
        for name in ("bool", "int4", "float8_e4m3fn", "bfloat16", "complex64")
    }
    flat = jax.tree_util.tree_flatten_with_path(leaves)[0]
    for path, row in spread(flat, dict.fromkeys(leaves, (0,))):
        fp.save(tmp_path / "c", {path[0].key: row.cut()}, options=QUICK)
    fp.finalize(tmp_path / "c")
    assert_equal(fp.load(tmp_path / "c"), leaves)


CELLS: dict[str, tuple[Any, ...]] = {
    "by stage": (None, "stage"),
    "by stage, and within": (None, "stage", "tensor"),
    "by repeat and stage": ("tensor", "stage"),
    "several repeats and stages a shard": ("tensor", None, None, "stage"),
    "by stage and repeat": ("stage", "tensor"),
    "replicated": (),
}


@pytest.mark.parametrize("spec", CELLS.values(), ids=CELLS)
def test_stage_of_a_repeat_is_cut_by_itself_out_of_the_shards_that_hold_it(
    tmp_path: Path, spec: tuple[Any, ...]
) -> None:
    leaf = put(numbers(4, 4, 2, 4), *spec)
    path = tmp_path / "cells"
    key = (jax.tree_util.DictKey("w"),)
    cells = [cell for _, cell in spread([(key, leaf)], {"w": (1, 0)})]
    assert [cell.start for cell in cells] == list(itertools.product(range(4), range(4)))
    for cell in cells[::-1]:
        cut = cell.cut()
        assert sum(shard.data.nbytes for shard in cut.value.addressable_shards) == 4 * 2 * 4
        for shard in cut.value.addressable_shards:
            (source,) = (one for one in leaf.addressable_shards if one.device == shard.device)
            assert source.replica_id == 0
        fp.save(path, {"w": cut}, options=QUICK)
    assert_like_saved_whole(path, leaf)


def test_pieces_cut_along_several_axes_may_be_of_any_extent(tmp_path: Path) -> None:
    leaf = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    path = tmp_path / "c"
    fp.save(path, {"w": fp.Slice(leaf[:3, :, :2], (0, 0), (4, 6), (0, -1))}, options=QUICK)
    fp.save(path, {"w": fp.Slice(leaf[3:, :, :2], (0, 3), (6, 4), (2, 0))}, options=QUICK)
    with pytest.raises(fp.IncompleteCheckpointError, match="8 of 24 chunks"):
        fp.finalize(path)
    with pytest.raises(fp.KeyConflictError, match="overlaps"):
        fp.save(path, {"w": fp.Slice(leaf[:1, :, 1:], (0, 1), (4, 6), (0, 2))}, options=QUICK)
    with pytest.raises(fp.KeyConflictError, match="cut along the same axes"):
        fp.save(path, {"w": fp.Slice(leaf[:, :, 2:], 2, 6, 2)}, options=QUICK)
    fp.save(path, {"w": fp.Slice(leaf[:, :, 2:], (0, 2), (4, 6), (0, 2))}, options=QUICK)
    fp.finalize(path)
    np.testing.assert_array_equal(fp.load(path)["w"], leaf)


@pytest.mark.parametrize(
    ("start", "size", "axis"),
    [((0,), (2, 2), (0, 1)), ((0, 0), (2, 2), (0, -2)), ((), (), ()), (0, (2, 2), (0, 1)),
     ((0, 0), (2, 2), (0, 2)), ((0, 0.0), (2, 2), (0, 1)), ((0, 1), (2, 2), (0, 1))],
    ids=str,
)  # fmt: skip
def test_slice_that_makes_no_sense_is_refused(
    tmp_path: Path, start: Any, size: Any, axis: Any
) -> None:
    with pytest.raises(fp.UnsupportedLeafError, match="is a Slice"):
        fp.save(tmp_path / "c", {"w": fp.Slice(np.zeros((2, 2)), start, size, axis)})
    assert not list(tmp_path.iterdir())


def test_all_rows_can_be_replaced(tmp_path: Path) -> None:
    old, new = (put(numbers(LAYERS, 8) + step, "stage") for step in (0, 1))
    for start in range(LAYERS):
        fp.save(tmp_path / "c", {"w": Row(old, (start,), (0,)).cut()}, options=QUICK)
    for start in range(LAYERS):
        row = {"w": Row(new, (start,), (0,)).cut()}
        fp.save(tmp_path / "c", row, options=QUICK, replace=True)
        if start < LAYERS - 1:
            with pytest.raises(fp.IncompleteCheckpointError, match="of 8 chunks"):
                fp.finalize(tmp_path / "c")
    fp.finalize(tmp_path / "c")
    np.testing.assert_array_equal(fp.load(tmp_path / "c")["w"], new)


def test_axis_of_a_slice_of_keys_is_one_of_the_keys(tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    for start in range(4):
        fp.save(tmp_path / "c", {"k": fp.Slice(keys[start : start + 1], start, 4, axis=-1)})
    fp.finalize(tmp_path / "c")
    assert_equal(fp.load(tmp_path / "c"), {"k": keys})
    with pytest.raises(fp.UnsupportedLeafError, match="axis=1"):
        fp.save(tmp_path / "d", {"k": fp.Slice(keys, 0, 4, axis=1)})


# Of the callback: what it takes from the state, and what is streamed.


def scanned_params(kind: AxisType = AxisType.Auto) -> dict[str, Any]:
    return {
        "embed": put(numbers(16, 4), None, "tensor", kind=kind),
        "layers": {
            "kernel": put(numbers(LAYERS, 8, 8), "stage", None, "tensor", kind=kind),
            "scale": put(numbers(LAYERS, 8), "stage", kind=kind),
        },
    }


ADAM = optax.adam(1e-2)


@jax.jit
def new_state(params: Any) -> dict[str, Any]:
    """With arrays still being computed."""
    twice = jax.tree.map(lambda x: x + x, params)
    moments = optax.tree.zeros_like(params), jax.tree.map(jnp.square, twice)
    (adam, *rest) = ADAM.init(params)
    state = adam._replace(mu=moments[0], nu=moments[1])
    return {"params": twice, "opt_state": (state, *rest), "step": jnp.int32(1)}


one_more = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)


def trainer_with(state: Any) -> Any:
    return types.SimpleNamespace(
        global_step=0,
        current_epoch=0,
        callback_metrics={"loss": 0.5},
        is_last_batch=True,
        state=state,
    )


def save_one_step(
    callback: PartialCheckpointCallback, trainer: Any, streamed: Any = (), after: Any = None
) -> None:
    """A step that hands over `streamed` (root, name, tree); `after` it may donate the state."""
    callback.on_fit_start(trainer, None)
    for root, name, tree in streamed:
        hook = callback.on_layer_ready if root == "params" else callback.on_optimizer_state_ready
        hook(trainer, name, tree)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, None, None, None, 0)
    if after is not None:
        trainer.state = after(trainer.state)
    callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)


def saved_in_one_step(directory: Path, params: Any, **options: Any) -> PartialCheckpointCallback:
    callback = PartialCheckpointCallback(directory, options=QUICK, **options)
    save_one_step(callback, trainer_with({"params": params}))
    return callback


LAYER_GROUPS = [f"{root}.layers.{row}" for root in ("opt_state", "params") for row in range(LAYERS)]


@pytest.mark.parametrize("mesh_is_set", [False, AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("budget", [None, 700], ids=["", "bounded"])
def test_state_is_saved_layer_by_layer_with_its_moments_and_may_be_donated(
    tmp_path: Path, mesh_is_set: Any, budget: int | None
) -> None:
    state = new_state(scanned_params(mesh_is_set or AxisType.Auto))
    want = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    options = fp.SaveOptions(max_inflight_bytes=budget, durable=False)
    callback = PartialCheckpointCallback(tmp_path, stacked={"params.layers": 0}, options=options)
    trainer = trainer_with(state)
    with jax.set_mesh(mesh_of(mesh_is_set)) if mesh_is_set else contextlib.nullcontext():
        save_one_step(callback, trainer, after=one_more)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    (report,) = callback.reports
    assert sorted(set(report.groups) - {"step", "params.embed", "opt_state.embed"}) == sorted(
        [*LAYER_GROUPS, "opt_state.0", "opt_state.1"]
    )
    layer = report.saves["opt_state.layers.3"]
    assert (layer.leaves, layer.bytes) == (4, 2 * 4 * (8 * 8 + 8))
    loaded = fp.load(tmp_path / "1", target=want)
    assert_equal(loaded, want)
    assert fp.verify(tmp_path / "1").ok


@pytest.mark.parametrize(
    ("axis", "spec"),
    [(0, (None, "stage")), (1, (None, "stage")), (-3, (None, "stage", "tensor"))],
    ids=["by repeat", "by stage", "counted from the end"],
)
def test_repeats_and_stages_are_stacked_along_either_axis(
    tmp_path: Path, axis: int, spec: tuple[Any, ...]
) -> None:
    leaf = put(numbers(3, 4, 8, 2), *spec)
    callback = saved_in_one_step(tmp_path, {"w": leaf}, stacked={"params.w": axis})
    rows = leaf.shape[axis]
    assert callback.reports[0].groups == tuple(f"params.w.{row}" for row in range(rows))
    np.testing.assert_array_equal(fp.load(tmp_path / "1")["params"]["w"], leaf)
    np.testing.assert_array_equal(ocp.load(tmp_path / "1")["params"]["w"], leaf)


@pytest.mark.parametrize("budget", [None, 200], ids=["", "bounded"])
def test_each_stage_of_each_repeat_is_a_layer_and_may_be_streamed(
    tmp_path: Path, budget: int | None
) -> None:
    leaf = put(numbers(3, 4, 8, 2), None, "stage", "tensor")
    params = {"w": leaf, "scale": put(numbers(3, 4), None, "stage"), "repeat": numbers(3)}
    state = new_state({"layers": params})
    want = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    callback = PartialCheckpointCallback(
        tmp_path,
        stacked={"params.layers": (0, 1)},
        options=fp.SaveOptions(durable=False, max_inflight_bytes=budget),
    )
    streamed = {
        name: fp.Slice(value[2:, 1:3], (2, 1), (3, 4), (0, 1))
        for name, value in state["params"]["layers"].items()
        if name != "repeat"
    }
    ready = [("params", "layers", streamed)]
    save_one_step(callback, trainer_with(state), ready, after=one_more)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    (report,) = callback.reports
    cells = [f"{repeat}.{stage}" for repeat in range(3) for stage in range(4)]
    taken = [f"params.layers.{cell}" for cell in cells if cell not in ("2.1", "2.2")]
    moments = [f"opt_state.layers.{cell}" for cell in cells]
    rest = ["step", "opt_state.0", "opt_state.1", "opt_state.layers", "params.layers"]
    assert sorted(report.groups) == sorted([*taken, *moments, *rest, "params.layers#2"])
    assert report.saves["opt_state.layers.1.3"].bytes == 2 * 4 * (8 * 2 + 1)
    assert_equal(fp.load(tmp_path / "1", target=want), want)
    assert fp.verify(tmp_path / "1").ok


@pytest.mark.parametrize("how", ["whole", "rows", "some rows"])
def test_trainer_streams_a_stack_whole_or_in_rows_and_the_rest_is_taken(
    tmp_path: Path, how: str
) -> None:
    params = scanned_params()
    layers = params["layers"]
    cuts = [
        {name: fp.Slice(leaf[at : at + 2], at, LAYERS) for name, leaf in layers.items()}
        for at in (6, 2)
    ]
    streamed: Any = {
        "whole": [("params", "layers", layers), ("opt_state", "layers", {"nu": layers})],
        "rows": [("params", "layers", cut) for cut in cuts],
        "some rows": [
            ("params", "layers", cuts[0]),
            ("params", ("layers", "scale"), cuts[1]["scale"]),
        ],
    }[how]
    stacked = {"params.layers": 0} | ({"opt_state.layers": 0} if how == "whole" else {})
    callback = PartialCheckpointCallback(tmp_path, stacked=stacked, options=QUICK)
    save_one_step(callback, trainer_with({"params": params}), streamed)
    groups = callback.reports[0].groups
    if how == "whole":
        assert groups == (*LAYER_GROUPS[LAYERS:], *LAYER_GROUPS[:LAYERS], "params.embed")
    else:
        first = ("params.layers", "params.layers#2" if how == "rows" else "params.layers.scale")
        taken = {"rows": (0, 1, 4, 5), "some rows": range(6)}[how]
        assert groups == (*first, "params.embed", *(f"params.layers.{row}" for row in taken))
    loaded = fp.load(tmp_path / "1")
    assert_equal(loaded["params"], params)
    if how == "whole":
        assert_equal(loaded["opt_state"]["layers"]["nu"], layers)


def test_what_has_no_such_axis_or_no_number_is_saved_whole(tmp_path: Path) -> None:
    layers = {
        "w": np.arange(12).reshape(3, 4),
        "keys": jax.random.split(jax.random.key(0), 3),
        "count": jnp.int32(7),
        "none": None,
        "nothing": jnp.zeros((3, 0)),
    }
    callback = saved_in_one_step(tmp_path, layers, stacked={"params": 0})
    assert callback.reports[0].groups == ("params", "params.0", "params.1", "params.2")
    assert callback.reports[0].saves["params"].leaves == 4
    target = {**layers, "w": np.zeros((3, 4), int)}
    loaded = fp.load(tmp_path / "1", target={"params": target})["params"]
    assert loaded.pop("none") is None
    del layers["none"]
    assert_equal(loaded, layers)


def test_longest_name_decides_and_own_groups_are_split(tmp_path: Path) -> None:
    params = {"a": {"x": numbers(2, 3), "y": numbers(2, 3)}, "b": numbers(2, 3)}
    stacked = {"params.a": 0, "params.a.y": 1}
    callback = saved_in_one_step(tmp_path, params, stacked=stacked, group_by=lambda _: "all")
    saves = callback.reports[0].saves
    leaves = {group: save.leaves for group, save in saves.items()}
    assert leaves == {"all": 1, "all.0": 2, "all.1": 2, "all.2": 1}
    assert_equal(fp.load(tmp_path / "1")["params"], params)


def test_groups_that_come_to_share_a_name_are_saved_together(tmp_path: Path) -> None:
    params = {"a": numbers(2, 3), "b": numbers(3), "c": numbers(3, 3)}
    group_by = lambda path: {"a": "x", "b": "x.0.1", "c": "x.0"}[path[-1].key]  # noqa: E731
    stacked = {"params.a": (0, 1), "params.c": 0}
    callback = saved_in_one_step(tmp_path, params, stacked=stacked, group_by=group_by)
    assert callback.reports[0].saves["x.0.1"].leaves == 3
    assert_equal(fp.load(tmp_path / "1")["params"], params)


def test_two_callbacks_share_what_is_stacked(tmp_path: Path) -> None:
    state = {"params": scanned_params()}
    first = PartialCheckpointCallback(tmp_path, stacked={"params.layers": 0}, options=QUICK)
    second = PartialCheckpointCallback(tmp_path, finalizer=first.finalizer, options=QUICK)
    trainer = trainer_with(state)
    for callback in (first, second):
        callback.on_fit_start(trainer, None)
    cut = {"kernel": fp.Slice(state["params"]["layers"]["kernel"][2:3], 2, LAYERS)}
    for callback in (second, first):
        callback.on_layer_ready(trainer, "layers", cut)
    trainer.global_step = 1
    for callback in (first, second):
        callback.on_train_batch_end(trainer, None, None, None, 0)
    for callback in (first, second):
        callback.on_train_end(trainer, None)
    assert_equal(fp.load(tmp_path / "1"), state)


def test_names_of_nothing_and_things_that_are_no_axis_are_refused(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, stacked={"params.layer": 0, "params": 0})
    with pytest.raises(ValueError, match=r"names 'params\.layer', and the state has no such leaf"):
        save_one_step(callback, trainer_with({"params": {"layers": numbers(2, 2)}}))
    callback.on_exception(None, None, KeyboardInterrupt())
    for wrong in (
        *({"params": "0"}, {"params": True}, {0: 0}, {"params": [0, 1]}),
        *({"params": ()}, {"params": (0, 0)}, {"params": (0, 1.0)}),
    ):
        with pytest.raises(TypeError, match="to the number of an axis"):
            PartialCheckpointCallback(tmp_path, stacked=wrong)  # type: ignore[arg-type]


# As MaxText stacks layers, and keeps model and optimizer.


@pytest.mark.parametrize("layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS)
def test_layout_of_maxtext_is_saved_by_rows(tmp_path: Path, layout: layouts.Layout) -> None:
    state = layouts.train_state(layout)
    callback = PartialCheckpointCallback(tmp_path, stacked=layout.stacked, options=QUICK)
    save_one_step(callback, trainer_with(state))
    (report,) = callback.reports
    assert fp.verify(report.path).ok
    assert_equal(fp.load(report.path, layouts.shapes(state)), state)
    assert_equal(ocp.load(report.path, layouts.shapes(state)), state)
    if layout.stacked:
        rows = {save.bytes for save in report.saves.values()}
        one = layouts.VALUES[0].nbytes
        assert rows == {one, 2 * one}  # of the parameters, and of both moments


class Layers(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(numbers(LAYERS, 4, 4))


class Decoder(nnx.Module):
    def __init__(self) -> None:
        self.layers = Layers()
        self.embed = nnx.Param(numbers(4, 4))


class TrainState(nnx.Module):
    """MaxText's: one module of model and optimizer."""

    def __init__(self) -> None:
        self.model = Decoder()
        self.optimizer = nnx.Optimizer(self.model, ADAM, wrt=nnx.Param)


NNX_STATES: dict[str, tuple[Any, str]] = {
    "module": (TrainState, "params.model.layers"),
    "nnx.State": (lambda: nnx.state(TrainState()), "params.model.layers"),
    "dict of its state": (lambda: {"all": nnx.state(TrainState())}, "all.model.layers"),
}


@pytest.mark.parametrize(("make", "name"), NNX_STATES.values(), ids=NNX_STATES)
def test_moments_beside_the_model_in_one_state_are_cut_with_its_rows(
    tmp_path: Path, make: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = PartialCheckpointCallback(tmp_path, stacked={name: 0}, options=QUICK)
    save_one_step(callback, trainer_with(make()))
    (report,) = callback.reports
    moments = f"{name.partition('.')[0]}.optimizer.opt_state.0"
    for row in range(LAYERS):
        assert report.saves[f"{name}.{row}"].bytes == 4 * 4 * 4
        assert report.saves[f"{moments}.{row}"].bytes == 2 * 4 * 4 * 4
    assert not caplog.records
    kernel = fp.metadata(report.path).leaves[f"{moments}.mu.layers.kernel"]
    assert kernel.shape == (LAYERS, 4, 4)


SAVED_WHOLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an axis that no leaf has": (
        {"params": {"layers": numbers(4, 2)}}, {"params.layers": 2}, "'params.layers' along .2,."
    ),
    "moments with other rows": (
        {"params": {"m": {"w": numbers(4, 2)}}, "mu": {"m": {"w": numbers(2, 4)}}}, {"params.m": 0},
        "'mu.m.w', of shape .2, 4., is called like the stacked 'params.m.w'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "stacked", "said"), SAVED_WHOLE.values(), ids=SAVED_WHOLE)
def test_what_was_to_be_cut_and_is_saved_whole_is_told_once(
    tmp_path: Path, state: Any, stacked: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback = PartialCheckpointCallback(
        tmp_path, stacked=stacked, every_n_train_steps=1, options=QUICK
    )
    trainer = trainer_with(state)
    callback.on_fit_start(trainer, None)
    for trainer.global_step in (1, 2):
        callback.on_train_batch_end(trainer, None, None, None, 0)
    callback.on_train_end(trainer, None)
    (record,) = caplog.records
    assert re.search(said, record.message)
    assert_equal(fp.load(tmp_path / "2"), state)


def test_name_below_another_root_is_told_where_it_is(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, stacked={"model.layers": 0})
    with pytest.raises(ValueError, match=r"such as 'params\.model\.layers'"):
        save_one_step(callback, trainer_with(TrainState()))
    callback.on_exception(None, None, KeyboardInterrupt())
