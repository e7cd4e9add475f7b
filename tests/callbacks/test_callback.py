"""What the callback promises while all goes well, with a trainer as small as can be."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stub_trainer import (
    EVERYTHING,
    LAYERS,
    PARAMS,
    ROWS,
    Loop,
    StubTrainer,
    begun,
    end_step,
    fitted,
    new_state,
    restored,
)

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback
from flax_partial.runs import completeness
from flax_partial.saving import save

if TYPE_CHECKING:
    from pathlib import Path


def assert_is_step(path: Path, step: int) -> None:
    """The checkpoint holds the state of this step, and nothing else; parts of two would show."""
    expected = new_state(step)
    loaded = fp.load(path, target=expected)
    assert jax.tree.structure(loaded) == jax.tree.structure(fp.load(path))
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert fp.metadata(path).training["step"] == step


def names_in(directory: Path) -> list[str]:
    return sorted({entry.name for entry in directory.iterdir()} - {"timeline"})


@pytest.mark.parametrize(
    "streamed",
    [
        pytest.param(frozenset(), id="nothing streamed"),
        pytest.param(PARAMS, id="parameters streamed"),
        pytest.param(frozenset([("opt_state", "blocks.1")]), id="one layer streamed"),
        pytest.param(EVERYTHING, id="all layers streamed"),
    ],
)
@pytest.mark.parametrize("counts_first", [False, True], ids=["counts after", "counts before"])
@pytest.mark.parametrize("starts_batches", [False, True], ids=["", "batch start hook"])
def test_checkpoint_holds_the_whole_state_of_its_step(
    tmp_path: Path, streamed: Any, *, counts_first: bool, starts_batches: bool
) -> None:
    how: Any = {"counts_first": counts_first, "starts_batches": starts_batches}
    fitted(tmp_path / "run", every_n_train_steps=2, epochs=2, batches=3, streamed=streamed, **how)
    assert names_in(tmp_path / "run") == ["2", "3", "4", "6"]
    for step in (2, 3, 4, 6):
        assert_is_step(tmp_path / "run" / str(step), step)


def test_group_is_committed_while_the_step_still_computes(tmp_path: Path) -> None:
    def look(trainer: StubTrainer) -> None:
        if trainer.is_last_batch:
            wait_for_leaves(tmp_path / "2", 4)
            seen.append(fp.status(tmp_path / "2").leaves)

    seen: list[tuple[str, ...]] = []
    streamed = [("params", "head"), ("params", "blocks.1")]
    fitted(tmp_path, streamed=streamed, at={"ready": look})
    assert seen == [
        ("params.blocks.1.b", "params.blocks.1.w", "params.head.b", "params.head.w"),
    ]


def wait_for_leaves(path: Path, count: int) -> None:
    """Waits until so many leaves are committed; the test's own timeout ends it otherwise."""
    pause = threading.Event()
    while True:
        try:
            if len(fp.status(path).leaves) >= count:
                return
        except fp.NoSessionError:
            pass
        pause.wait(0.01)


def test_layers_come_in_any_order_from_any_thread(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path)

    def stream(trainer: StubTrainer) -> None:
        def save(number: int) -> None:
            tree = {"w": jnp.full((4,), number, jnp.float32)}
            callback.on_layer_ready(trainer, LAYERS[number], tree)

        with ThreadPoolExecutor() as threads:
            list(threads.map(save, range(len(LAYERS))))

    loop = Loop(callback, batches=1, at={"ready": stream})
    loop.trainer.state = {"seen": jnp.int32(0)}
    loop.fit()
    params = fp.load(tmp_path / "1")["params"]
    assert [params[name]["w"][0] for name in ("embed", "head")] == [0, 3]
    assert [params["blocks"][key]["w"][0] for key in "01"] == [1, 2]


def test_streaming_costs_nothing_on_steps_that_are_not_saved(tmp_path: Path) -> None:
    class Untouchable:
        """Fails at any access."""

        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

    callback = PartialCheckpointCallback(tmp_path, every_n_epochs=None, every_n_train_steps=3)
    trainer = begun(callback)
    for step in (1, 2):
        assert not callback.will_save(trainer)
        callback.on_layer_ready(trainer, "head", Untouchable())
        callback.on_optimizer_state_ready(trainer, "head", Untouchable())
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, step)
    assert names_in(tmp_path) == []
    assert callback.will_save(trainer)
    callback.on_layer_ready(trainer, "head", {"w": jnp.ones(3)})
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert names_in(tmp_path) == ["3.partial_save"]


def test_a_step_is_saved_once_however_often_its_batches_end(tmp_path: Path) -> None:
    """With accumulated gradients, several batches make one step."""
    callback = PartialCheckpointCallback(tmp_path, every_n_epochs=None, every_n_train_steps=2)
    trainer = begun(callback)
    for batch in range(8):
        assert callback.will_save(trainer) == (trainer.global_step % 2 == 1)
        end_step(callback, trainer, (batch + 1) // 2)
    callback.on_train_end(trainer, None)
    assert fp.steps(tmp_path) == [2, 4]
    assert callback.failed_saves == 0


def test_epoch_is_saved_at_its_last_batch_and_finalized_when_it_ends(tmp_path: Path) -> None:
    def before_the_end(trainer: StubTrainer) -> None:
        wait_for_leaves(tmp_path / str(trainer.global_step), 17)
        seen.append(names_in(tmp_path))

    seen: list[list[str]] = []
    at = {"on_train_epoch_end": _on_odd(before_the_end)}
    callback = fitted(tmp_path, every_n_epochs=2, epochs=4, at=at)
    assert seen == [["4.partial_save"], ["4", "8.partial_save"]]
    assert fp.steps(tmp_path) == [4, 8]
    assert [report.epoch for report in callback.reports] == [1, 3]


def _on_odd(look: Any) -> Any:
    return lambda trainer: look(trainer) if trainer.current_epoch % 2 else None


def test_epoch_that_ends_early_is_saved_all_the_same(tmp_path: Path) -> None:
    class NeverLast(StubTrainer):
        __slots__ = ()
        is_last_batch = property(lambda _: False, lambda *_: None)  # type: ignore[assignment]

    callback = PartialCheckpointCallback(tmp_path)
    Loop(callback, epochs=2, streamed=EVERYTHING, trainer=NeverLast()).fit()
    assert fp.steps(tmp_path) == [2, 4]
    assert_is_step(tmp_path / "4", 4)


def test_step_is_finalized_in_the_background_before_training_ends(tmp_path: Path) -> None:
    seen = threading.Event()

    def look(trainer: StubTrainer) -> None:
        pause = threading.Event()
        while trainer.global_step == 2 and not (tmp_path / "1").exists():
            pause.wait(0.01)
        seen.set()

    at = {"on_train_batch_start": look}
    fitted(tmp_path, every_n_epochs=None, every_n_train_steps=1, batches=3, at=at)
    assert seen.is_set()
    assert fp.steps(tmp_path) == [1, 2, 3]


def test_groups_are_layers_by_default_and_whatever_group_by_says(tmp_path: Path) -> None:
    layers = fitted(tmp_path / "layers", streamed=[("params", "head")])
    others = ["blocks.0", "blocks.1", "embed"]
    moments = [f"opt_state.{name}" for name in (*others, "head")]
    params = [f"params.{name}" for name in others]
    assert [*layers.reports[0].groups] == ["params.head", *moments, *params, "seen"]
    roots = fitted(tmp_path / "roots", group_by=lambda path: path[0].key)
    assert roots.reports[0].groups == ("opt_state", "params", "seen")
    for directory in ("layers", "roots"):
        assert_is_step(tmp_path / directory / "2", 2)


@pytest.mark.parametrize(
    ("stacked", "limit", "calls"),
    [
        pytest.param(None, None, [2], id="at once"),
        pytest.param(None, 1 << 30, [2], id="at once where memory is bounded"),
        pytest.param({"params.blocks": 0}, None, [6], id="rows at once"),
        pytest.param({"params.blocks": 0}, 1 << 30, [1] * 6, id="rows at their turn"),
    ],
)
def test_groups_that_are_due_together_are_handed_over_by_one_call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stacked: dict[str, int] | None,
    limit: int | None,
    calls: list[int],
) -> None:
    found: list[int] = []
    hand_over = save.hand_over

    def counted(jobs: Any) -> None:
        found.append(len(jobs))
        hand_over(jobs)

    monkeypatch.setattr(save, "hand_over", counted)
    layers = {"params": {"blocks": {"w": np.ones((5, 3))}, "head": np.ones(3)}}
    callback = fitted(
        tmp_path,
        batches=1,
        state_fn=lambda *_: layers,
        stacked=stacked,
        options=fp.SaveOptions(durable=False, max_inflight_bytes=limit),
    )
    (report,) = callback.reports
    assert found == calls
    assert len(report.saves) == sum(calls)


def test_state_fn_says_what_is_saved(tmp_path: Path) -> None:
    def state_fn(trainer: StubTrainer, module: str) -> Any:
        return {"name": module, "seen": trainer.state["seen"]}

    Loop(PartialCheckpointCallback(tmp_path, state_fn=state_fn)).fit("a module")
    assert fp.load(tmp_path / "2") == {"name": "a module", "seen": 2}


def test_streamed_name_may_be_a_tuple_with_list_indices(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, state_fn=lambda *_: {"params": {"head": [1]}})

    def stream(trainer: StubTrainer) -> None:
        callback.on_layer_ready(trainer, ("blocks", 1), {"w": 11})
        callback.on_layer_ready(trainer, ("blocks", 0), {"w": 10})
        callback.on_layer_ready(trainer, ("dotted.name",), 5)
        callback.on_optimizer_state_ready(trainer, "", [1, 2])

    Loop(callback, batches=1, at={"ready": stream}).fit()
    assert fp.load(tmp_path / "1") == {
        "params": {"blocks": [{"w": 10}, {"w": 11}], "dotted.name": 5, "head": [1]},
        "opt_state": [1, 2],
    }


def test_layer_in_pieces_and_slices_become_one_checkpoint(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, state_fn=lambda *_: {})
    stacked = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)

    def stream(trainer: StubTrainer) -> None:
        for layer in (2, 0, 1):
            piece = fp.Slice(stacked[layer : layer + 1], layer, 3)
            callback.on_layer_ready(trainer, "stacked", {"w": piece})

    Loop(callback, batches=1, at={"ready": stream}).fit()
    loaded = fp.load(tmp_path / "1")
    np.testing.assert_array_equal(loaded["params"]["stacked"]["w"], stacked)
    (report,) = callback.reports
    assert report.groups == ("params.stacked", "params.stacked#2", "params.stacked#3")


def test_callbacks_that_share_a_hook_make_one_checkpoint_finalized_once(tmp_path: Path) -> None:
    hook = FinalizeHook()
    one = PartialCheckpointCallback(tmp_path, finalizer=hook, state_fn=lambda *_: {})
    two = PartialCheckpointCallback(tmp_path, finalizer=hook)
    receivers = {"params": one, "opt_state": two}
    Loop(one, two, epochs=2, streamed=EVERYTHING, receivers=receivers).fit()
    assert one.state_key != two.state_key
    assert names_in(tmp_path) == ["2", "4"]
    assert [report.step for report in hook.reports] == [2, 4]
    for step in (2, 4):
        assert_is_step(tmp_path / str(step), step)


def test_layer_handed_to_all_callbacks_is_saved_by_one(tmp_path: Path) -> None:
    hook = FinalizeHook()
    callbacks = [PartialCheckpointCallback(tmp_path, finalizer=hook) for _ in range(2)]

    def stream(trainer: StubTrainer) -> None:
        params = trainer.state["params"]
        for callback in callbacks:
            callback.on_layer_ready(trainer, "head", params["head"])
            for layer, key in enumerate(params["blocks"]):
                piece = fp.Slice(params["blocks"][key]["w"], ROWS * layer, 2 * ROWS)
                callback.on_layer_ready(trainer, "stacked", piece)

    Loop(*callbacks, at={"ready": stream}).fit()
    assert fp.steps(tmp_path) == [2]
    assert fp.load(tmp_path / "2")["params"]["stacked"].shape == (2 * ROWS, 2)
    assert hook.reports[0].groups[:3] == ("params.head", "params.stacked", "params.stacked#2")


def test_hook_waits_only_for_the_callbacks_that_save_the_step(tmp_path: Path) -> None:
    def saving(root: str, every: int) -> PartialCheckpointCallback:
        steps: Any = {"every_n_epochs": None, "every_n_train_steps": every}
        state_fn = lambda trainer, _: {root: trainer.state[root]}  # noqa: E731
        return PartialCheckpointCallback(tmp_path, finalizer=hook, state_fn=state_fn, **steps)

    hook = FinalizeHook()
    Loop(saving("opt_state", 2), saving("params", 1), batches=4).fit()
    assert fp.steps(tmp_path) == [1, 2, 3, 4]
    assert [sorted(fp.load(tmp_path / str(step))) for step in (1, 2)] == [
        ["params"],
        ["opt_state", "params"],
    ]


def test_callbacks_of_different_directories_may_share_a_hook(tmp_path: Path) -> None:
    hook = FinalizeHook()
    one = PartialCheckpointCallback(tmp_path / "one", keep_last=1, finalizer=hook)
    two = PartialCheckpointCallback(tmp_path / "two", keep_last=2, finalizer=hook)
    Loop(one, two, epochs=3).fit()
    assert [fp.steps(tmp_path / name) for name in ("one", "two")] == [[6], [4, 6]]


def test_reports_tell_what_each_checkpoint_cost(tmp_path: Path) -> None:
    metrics = lambda step: {"loss": 1 / step}  # noqa: E731
    callback = fitted(tmp_path, epochs=2, streamed=PARAMS, metrics=metrics)
    first, second = callback.reports
    assert (first.step, second.step) == (2, 4)
    assert first.path == tmp_path / "2"
    assert first.groups[:4] == ("params.head", "params.embed", "params.blocks.1", "params.blocks.0")
    size = 8 * (ROWS * 2 * 4 + 2 * 2) + 4
    assert first.bytes == size == sum(save.bytes for save in first.saves.values())
    assert first.metrics == {"loss": 0.5}
    assert first.write_secs >= max(save.write_secs for save in first.saves.values()) > 0
    assert first.finalize_secs > 0
    assert first.blocked_secs >= sum(save.blocked_secs for save in first.saves.values()) > 0


def test_end_of_training_waits_and_leaves_nothing_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes what pytest captures for a terminal
    callback = PartialCheckpointCallback(tmp_path, progress=True)
    trainer = begun(callback)
    end_step(callback, trainer, 1, is_last=True)
    callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert fp.steps(tmp_path) == [1]
    names = [thread.name for thread in threading.enumerate()]  # those of saves stay for a while
    assert not [name for name in names if name.startswith("flax_partial_")]
    assert capsys.readouterr() == ("", "")  # no bar for what is done at once


def test_teardown_waits_too(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path, every_n_epochs=None, every_n_train_steps=1)
    trainer = StubTrainer()
    callback.setup(trainer, None, "fit")
    end_step(callback, trainer, 1)
    callback.teardown(trainer, None, "fit")
    assert fp.steps(tmp_path) == [1]


def test_loop_that_calls_nothing_but_the_end_of_a_batch_is_served(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"left": "by a killed run"})
    callback = PartialCheckpointCallback(tmp_path)
    trainer = StubTrainer()
    for step in range(1, 7):
        callback.on_layer_ready(trainer, "head", new_state(step)["params"]["head"])
        trainer.current_epoch, is_last = step // 2, step % 2 == 1
        trainer.is_last_batch = is_last
        end_step(callback, trainer, step, is_last=is_last)
    callback.on_train_end(trainer, None)
    assert names_in(tmp_path) == ["1", "3", "5"]
    for step in (1, 3, 5):
        assert_is_step(tmp_path / str(step), step)


def test_restore_gives_the_newest_or_the_best_and_its_step(tmp_path: Path) -> None:
    losses = {2: 0.5, 4: 0.1, 6: 0.3}
    fitted(tmp_path, epochs=3, metrics=lambda step: {"loss": losses.get(step, 9.0)})
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), new_state(0))
    again = PartialCheckpointCallback(tmp_path, monitor="loss")
    for which, step in (("latest", 6), ("best", 4)):
        state, at = restored(again, target, which=which)
        assert at == step
        jax.tree.map(np.testing.assert_array_equal, state, new_state(step))
    only, _ = restored(again, {"params": target["params"]}, partial=True)
    assert list(only) == ["params"]
    assert sorted(restored(again)[0]) == ["opt_state", "params", "seen"]


def test_restore_reads_what_earlier_versions_left(tmp_path: Path) -> None:
    """They stored metadata beside a leaf `checkpoint_step`, where every other leaf was cut."""
    for step in (1, 2):
        session = completeness.saved(callback="a", group="w")
        closing = completeness.closing(["a"], callback="a", groups=["w"])
        fp.save(tmp_path / str(step), {"w": np.arange(3)}, custom_metadata={"step": step})
        metadata = {"step": step, "session": session | closing}
        fp.save(tmp_path / str(step), {"checkpoint_step": step}, custom_metadata=metadata)
    fp.finalize(tmp_path / "1")
    callback = PartialCheckpointCallback(tmp_path)
    for step in (1, 2):  # the latter was not finalized
        state, _ = restored(callback, {"w": np.zeros(3, int)}, which=step)
        np.testing.assert_array_equal(state["w"], np.arange(3))


def test_restore_of_nothing_is_none(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path / "never made", monitor="loss")
    assert callback.restore() is None
    assert callback.restore(which="best") is None
    assert not (tmp_path / "never made").exists()


def test_resumed_run_goes_on_with_the_next_step(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=2)
    callback = PartialCheckpointCallback(tmp_path)
    Loop(callback, epochs=4, streamed=EVERYTHING).resume(*restored(callback, new_state(0))).fit()
    assert fp.steps(tmp_path) == [2, 4, 6, 8]
    assert_is_step(tmp_path / "8", 8)


def test_what_is_not_kept_is_removed_when_the_next_run_has_finalized(tmp_path: Path) -> None:
    fitted(tmp_path, epochs=3)
    callback = PartialCheckpointCallback(tmp_path, keep_last=1)
    loop = Loop(callback, epochs=4).resume(*restored(callback, new_state(0)))
    assert names_in(tmp_path) == ["2", "4", "6"]
    loop.fit()
    assert names_in(tmp_path) == ["8"]


def test_metrics_of_the_whole_epoch_are_stored(tmp_path: Path) -> None:
    def validate(trainer: StubTrainer) -> None:
        trainer.callback_metrics["val_loss"] = jnp.float32(0.25)

    metrics = {"loss": float("nan"), "text": "high"}
    at = {"on_train_epoch_end": validate}
    fitted(tmp_path, monitor="val_loss", streamed=EVERYTHING, metrics=lambda _: metrics, at=at)
    found = fp.metadata(tmp_path / "2")
    assert (found.training["step"], found.training["epoch"]) == (2, 0)
    assert found.custom_metadata == {"metrics": {"val_loss": 0.25}}
    assert_is_step(tmp_path / "2", 2)


def test_missing_monitor_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deleted = jnp.ones(())
    deleted.delete()
    metrics = {"loss": 1, "gone": deleted}
    callback = fitted(tmp_path, monitor="val_loss", metrics=lambda _: metrics)
    assert "'val_loss' is not among the trainer's metrics so far" in caplog.text
    assert "Metrics there are: gone, loss." in caplog.text
    assert callback.best_model_path == ""
    with pytest.raises(ValueError, match=r"'val_loss'.* stored: loss"):
        callback.restore(which="best")


def test_state_dict_round_trip_does_not_save_the_same_step_again(tmp_path: Path) -> None:
    callback = fitted(tmp_path)
    again = PartialCheckpointCallback(tmp_path)
    again.load_state_dict(callback.state_dict())
    assert again.state_key == callback.state_key
    assert again.state_dict() == callback.state_dict() == {"last_saved": 2, "failed_saves": 0}
    trainer = begun(again)
    end_step(again, trainer, 2, is_last=True)
    again.on_train_end(trainer, None)
    assert names_in(tmp_path) == ["2"]
