"""All kinds of items that Orbax's managers and handlers write are read, or said to be left out."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from etils import epath
from orbax.checkpoint.experimental import v1
from orbax_side import assert_same, edit

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TREE = {"w": np.arange(3.0), "note": "text"}
CONFIG = {"lr": 0.1, "layers": [{"width": 2**63}, None], "name": "ü", "is": True, "no": {}, "n": []}
KEY = jax.random.key(3)

ITEMS: dict[str, tuple[Any, Any]] = {  # how it is saved, what is read
    "tree": (v0.args.PyTreeSave(TREE), TREE),
    "strings": (v0.args.PyTreeSave({"a": "text", "b": ["c"]}), {"a": "text", "b": ["c"]}),
    "nothing": (v0.args.PyTreeSave({"a": None, "b": {}}), {"a": None, "b": {}}),
    "array": (v0.args.ArraySave(jnp.arange(4)), jnp.arange(4)),
    "scalar": (v0.args.ArraySave(5), 5),
    "key": (v0.args.JaxRandomKeySave(KEY), KEY),
    "raw-key": (v0.args.JaxRandomKeySave(jax.random.PRNGKey(3)), jax.random.PRNGKey(3)),
    "json": (v0.args.JsonSave(CONFIG), CONFIG),
    "json-list": (v0.args.JsonSave([1, {"a": None}]), [1, {"a": None}]),
}
NUMPY_STATE = np.random.RandomState(7).get_state(legacy=False)


def saved(path: Path, **items: Any) -> Path:
    """A step of a manager."""
    with v0.CheckpointManager(path) as manager:
        manager.save(3, args=v0.args.Composite(**items))
    return path / "3"


def with_foreign_data(path: Path, **items: Any) -> Path:
    """A step whose item `data` another program's handler wrote."""
    step = saved(path, data=ITEMS["json"][0], **items)
    handler = {"data": "grain.PyGrainCheckpointHandler"}
    edit(step / "_CHECKPOINT_METADATA", lambda table: table["item_handlers"].update(handler))
    return step


def without_marks(step: Path) -> Path:
    """As older managers left it."""
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (step / name).unlink(missing_ok=True)
    return step


# --- one item, and several


@pytest.mark.parametrize(("save", "want"), ITEMS.values(), ids=ITEMS)
def test_single_item_is_the_checkpoint(save: Any, want: Any, tmp_path: Path) -> None:
    step = saved(tmp_path, anything=save)
    assert_same(fp.load(step), want)
    assert_same(fp.load(step, want), want)
    assert_same(fp.load(step / "anything"), want)
    assert fp.steps(tmp_path) == [3]
    assert fp.verify(step).bad == {}
    assert fp.metadata(step).left_out == {}


def test_several_items_are_a_dict_of_them(tmp_path: Path) -> None:
    step = saved(tmp_path, **{name: save for name, (save, _) in ITEMS.items()})
    want = {name: value for name, (_, value) in ITEMS.items()}
    assert_same(fp.load(step), want)
    assert_same(fp.load(step, want), want)
    for name, value in want.items():
        assert_same(fp.load(step / name), value)
        assert_same(fp.load(step, {name: value}, partial=True), {name: value})
    with v0.CheckpointManager(tmp_path) as manager:
        theirs = manager.restore(3)
    assert_same(theirs["json"], want["json"])
    assert_same(theirs["array"], want["array"])


def test_state_of_numpys_generator_goes_on(tmp_path: Path) -> None:
    step = saved(tmp_path, rng=v0.args.NumpyRandomKeySave(NUMPY_STATE), config=ITEMS["json"][0])
    again = np.random.RandomState()
    again.set_state(fp.load(step, {"rng": NUMPY_STATE, "config": CONFIG})["rng"])
    assert again.random_sample() == np.random.RandomState(7).random_sample()


def test_only_tree_is_loaded_into_a_target_that_names_no_item(tmp_path: Path) -> None:
    step = saved(tmp_path, state=ITEMS["tree"][0], config=ITEMS["json"][0], rng=ITEMS["key"][0])
    assert_same(fp.load(step, TREE), TREE)
    assert_same(fp.load(step, {"state": TREE}, partial=True), {"state": TREE})
    with pytest.raises(fp.TargetMismatchError, match=r"'config\.lr' is not in the target"):
        fp.load(step, {"state": TREE})


@pytest.mark.parametrize("name", ITEMS)
def test_checkpoint_of_one_handler_alone_is_read(name: str, tmp_path: Path) -> None:
    save, want = ITEMS[name]
    with v0.Checkpointer(v0.CompositeCheckpointHandler()) as composite:
        composite.save(tmp_path / "items", args=v0.args.Composite(it=save))
    with v0.Checkpointer(HANDLERS[type(save)]()) as checkpointer:
        checkpointer.save(tmp_path / "alone", args=save)
    assert_same(fp.load(tmp_path / "items"), want)
    assert_same(fp.load(tmp_path / "alone"), want)


HANDLERS = {
    v0.args.PyTreeSave: v0.PyTreeCheckpointHandler,
    v0.args.ArraySave: v0.ArrayCheckpointHandler,
    v0.args.JaxRandomKeySave: v0.JaxRandomKeyCheckpointHandler,
    v0.args.JsonSave: v0.JsonCheckpointHandler,
}


def test_json_of_any_file_name_is_read(tmp_path: Path) -> None:
    with v0.Checkpointer(v0.JsonCheckpointHandler(filename="my.json")) as checkpointer:
        checkpointer.save(tmp_path / "named", args=v0.args.JsonSave(CONFIG))
    assert_same(fp.load(tmp_path / "named"), CONFIG)


def test_items_of_v1_are_read(tmp_path: Path) -> None:
    registry = v1.handlers.local_registry()
    registry.add(v1.handlers.JsonHandler, checkpointable_name="config")
    context = v1.Context()
    context.checkpointables.registry = registry
    items = {"state": {"w": np.ones(2)}, "info": {"note": "hi"}, "config": CONFIG}
    with context:
        v1.save_checkpointables(tmp_path / "v1", items)
    assert_same(fp.load(tmp_path / "v1"), items)


# --- older steps


@pytest.mark.parametrize(
    ("items", "want"),
    [
        ({"default": v0.args.PyTreeSave(TREE)}, TREE),
        ({"state": v0.args.PyTreeSave(TREE)}, TREE),
        ({"a": ITEMS["tree"][0], "b": ITEMS["strings"][0]}, {"a": TREE, "b": ITEMS["strings"][1]}),
        ({"s": ITEMS["tree"][0], "c": ITEMS["json"][0]}, {"s": TREE, "c": CONFIG}),
        ({"s": ITEMS["tree"][0], "k": ITEMS["key"][0]}, {"s": TREE, "k": KEY}),
    ],
    ids=["default", "one-item", "two-trees", "json", "key"],
)
def test_step_without_a_mark_is_read(items: Any, want: Any, tmp_path: Path) -> None:
    step = without_marks(saved(tmp_path, **items))
    assert fp.steps(tmp_path) == [3]
    assert_same(fp.load(step), want)


def test_directory_of_checkpoints_is_not_taken_for_an_old_step(tmp_path: Path) -> None:
    for path in (tmp_path / "7" / "best", tmp_path / "8" / "1" / "x", tmp_path / "runs" / "x"):
        with v0.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"a": np.ones(2)})
    without_marks(tmp_path / "runs" / "x")
    assert fp.steps(tmp_path) == []
    assert fp.steps(tmp_path / "8") == []


def test_what_handlers_wrote_by_themselves_is_read_where_it_is_meant(tmp_path: Path) -> None:
    """Without a checkpointer around them nothing marks it as a checkpoint, or names them."""
    items = v0.args.Composite(**{name: ITEMS[name][0] for name in ("tree", "json", "key")})
    for name, handler, save, want in (
        ("items", v0.CompositeCheckpointHandler(), items, {k: ITEMS[k][1] for k in items.keys()}),  # noqa: SIM118
        *(
            (name, HANDLERS[type(ITEMS[name][0])](), *ITEMS[name])
            for name in ("json", "key", "tree")
        ),
    ):
        (tmp_path / name).mkdir()
        handler.save(epath.Path(tmp_path / name), args=save)
        handler.finalize(epath.Path(tmp_path / name))
        assert_same(fp.load(tmp_path / name), want)
    assert fp.steps(tmp_path) == []


# --- metrics


def test_metrics_of_a_manager_are_in_the_metadata(tmp_path: Path) -> None:
    tracked = v0.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with v0.CheckpointManager(tmp_path / "v0", options=tracked) as manager:
        manager.save(1, args=v0.args.StandardSave({"w": np.ones(2)}), metrics={"loss": 0.5})
    with v1.training.Checkpointer(tmp_path / "v1") as checkpointer:
        checkpointer.save(1, {"w": np.ones(2)}, metrics={"loss": 0.5})
    for path in (tmp_path / "v0" / "1", tmp_path / "v1" / "1"):
        assert fp.metadata(path).custom_metadata == {"metrics": {"loss": 0.5}}
        assert_same(fp.load(path), {"w": np.ones(2)})


def test_tree_called_metrics_is_an_item(tmp_path: Path) -> None:
    items = v0.args.Composite(state=ITEMS["tree"][0], metrics=ITEMS["strings"][0])
    with v0.Checkpointer(v0.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args=items)
    assert_same(fp.load(tmp_path / "c"), {"state": TREE, "metrics": ITEMS["strings"][1]})


# --- what is broken, or of a kind that is not read

BREAKS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "tree": (lambda bad: (bad / "_METADATA").write_text("{"), fp.CorruptCheckpointError),
    "database": (lambda bad: (bad / "manifest.ocdbt").unlink(), fp.CorruptCheckpointError),
    "foreign-leaf": (
        lambda bad: edit(
            bad / "_METADATA",
            lambda t: t["tree_metadata"]["('w',)"]["value_metadata"].update(value_type="mine"),
        ),
        fp.UnsupportedLeafError,
    ),
}


@pytest.mark.parametrize(("breaks", "kind"), BREAKS.values(), ids=BREAKS)
def test_broken_item_leaves_the_others_readable(breaks: Any, kind: Any, tmp_path: Path) -> None:
    step = saved(tmp_path, good=ITEMS["tree"][0], bad=ITEMS["tree"][0], also=ITEMS["json"][0])
    breaks(step / "bad")
    assert_same(fp.load(step, {"good": TREE}, partial=True), {"good": TREE})
    assert_same(fp.load(step / "good"), TREE)
    for wanted in (None, {"good": TREE, "also": CONFIG}, {"bad": TREE}):
        with pytest.raises(kind, match="partial=True and a target that lacks 'bad'"):
            fp.load(step, wanted)
    assert list(fp.metadata(step).left_out) == ["bad"]
    assert {name.partition(".")[0] for name in fp.metadata(step).leaves} == {"good", "also"}
    assert list(fp.verify(step).bad) == ["bad"]
    with pytest.raises(kind):
        fp.load(step / "bad")


def test_item_of_a_foreign_handler_is_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = with_foreign_data(tmp_path, state=ITEMS["tree"][0])
    with caplog.at_level(logging.WARNING, "flax_partial"):
        assert_same(fp.load(step), TREE)
        assert "3/data was not loaded: only its own handler reads it: grain." in caplog.text
        caplog.clear()
        assert_same(fp.load(step, TREE), TREE)
        assert not caplog.records
    assert list(fp.metadata(step).left_out) == ["data"]


def test_handler_whose_name_is_half_a_character_can_be_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = with_foreign_data(tmp_path, state=ITEMS["tree"][0])
    edit(
        step / "_CHECKPOINT_METADATA",
        lambda table: table["item_handlers"].update(data="\ud800"),
    )
    with caplog.at_level(logging.WARNING, "flax_partial"):
        assert_same(fp.load(step), TREE)
    assert r"reads it: \ud800." in caplog.text
    caplog.text.encode()


def test_checkpoint_of_foreign_handlers_alone_is_said_to_be_unsupported(tmp_path: Path) -> None:
    step = with_foreign_data(tmp_path)
    for read in (fp.load, fp.metadata):
        with pytest.raises(fp.UnsupportedLeafError, match=r"'data', only its own .*: grain"):
            read(step)


NO_TREES: dict[str, Any] = {
    "one-name-twice": {"a.b": 1, "a": {"b": 2}},
    "integer-of-65-bits": {"a": 2**64},
    "generator": np.random.default_rng(0).bit_generator.state,
    "half-a-character": {"\ud800": 1},
}


@pytest.mark.parametrize("value", NO_TREES.values(), ids=NO_TREES)
def test_json_that_no_tree_can_hold_is_left_out_and_said(
    value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = saved(tmp_path, tree=ITEMS["tree"][0], config=v0.args.JsonSave(value))
    assert list(fp.metadata(step).left_out) == ["config"]
    assert_same(fp.load(step, TREE), TREE)
    with caplog.at_level(logging.WARNING, "flax_partial"):
        assert_same(fp.load(step), TREE)
    assert "config was not loaded" in caplog.text
    with pytest.raises(fp.UnsupportedLeafError, match="config/metadata does not fit into a tree"):
        fp.load(step / "config")


def test_msgpack_of_the_first_versions_is_unsupported_and_not_damaged(tmp_path: Path) -> None:
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", {"w": np.ones(2)})
    (tmp_path / "old" / "_METADATA").unlink()
    (tmp_path / "old" / "checkpoint").write_bytes(b"\x81\xa1w\x01")
    for read in (fp.load, fp.metadata):
        with pytest.raises(fp.UnsupportedLeafError, match="msgpack"):
            read(tmp_path / "old")
    (tmp_path / "old" / "checkpoint").write_text("model_checkpoint_path: TensorFlow's")
    with pytest.raises(fp.NoSessionError):
        fp.load(tmp_path / "old")


def test_item_that_is_being_deleted_is_not_read(tmp_path: Path) -> None:
    step = saved(tmp_path, good=ITEMS["tree"][0], gone=ITEMS["strings"][0])
    (step / "_CHECKPOINT_DELETION").write_text('{"checkpointable_name": "gone"}')
    shutil.rmtree(step / "gone" / "d", ignore_errors=True)
    assert_same(fp.load(step), TREE)


def test_container_that_another_partial_save_filled_is_not_in_the_way(tmp_path: Path) -> None:
    """Orbax skips it too: `InternalTreeMetadata.as_nested_tree`."""
    v1.save(tmp_path / "c", {"a": {"b": np.ones(2)}, "z": []})
    key = {"key_metadata": [{"key": "a", "key_type": 2}]}
    edit(
        tmp_path / "c" / "state" / "_METADATA",
        lambda t: t["tree_metadata"].update({"('a',)": t["tree_metadata"]["('z',)"] | key}),
    )
    want = {"a": {"b": np.ones(2)}, "z": []}
    assert_same(v1.load(tmp_path / "c"), want)
    assert_same(fp.load(tmp_path / "c"), want)
