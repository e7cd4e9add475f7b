"""Training goes on exactly where it is told to, or says why it does not."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import assert_equal
from stub_trainer import StubTrainer, begun, end_step, restored

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback, checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY_STEP: Any = {"every_n_train_steps": 1, "every_n_epochs": None}


def weights(value: float) -> dict[str, Any]:
    return {"w": jnp.full(2, value)}


def trained(directory: Path, steps: int, **options: Any) -> checkpointing:
    """A run that was never restored, whose weights and loss tell their step."""
    with checkpointing(directory, **(EVERY_STEP | options)) as ckpt:
        for step in range(1, steps + 1):
            ckpt.step(weights(step), metrics={"loss": abs(step - 2)})
    return ckpt


# What target and checkpoint have in common.

SAVED: Any = {"w": np.ones(2, np.float32), "layers": [{"b": np.ones(1)} for _ in range(3)]}
LESS: Any = {"w": np.zeros(2, np.float32), "layers": [{"b": np.zeros(1)} for _ in range(2)]}
MORE: Any = SAVED | {"last_batch": np.zeros(3)}
OTHER: Any = SAVED | {"w": np.zeros(2, np.float16)}


def by_checkpointing(directory: Path, target: Any, **options: Any) -> Any:
    with checkpointing(directory, every_n_epochs=1) as ckpt:
        return ckpt.restore(target, **options)


def by_callback(directory: Path, target: Any, **options: Any) -> Any:
    return restored(PartialCheckpointCallback(directory), target, **options)[0]


def by_load(directory: Path, target: Any, **options: Any) -> Any:
    return fp.load(fp.latest(directory) or "", target, **options)


@pytest.mark.parametrize("restore", [by_checkpointing, by_callback, by_load])
@pytest.mark.parametrize(
    ("target", "option", "said"),
    [
        (LESS, "partial", "'layers.2.b' is not in the target"),
        (MORE, "keep_missing", "'last_batch' is not in the checkpoint"),
        (OTHER, "cast", r"'w' is float32\[2\] in the checkpoint, float16\[2\] in the target"),
    ],
    ids=["the target has less", "the target has more", "another dtype"],
)
def test_target_and_checkpoint_have_the_same_leaves_unless_told_otherwise(
    tmp_path: Path, restore: Callable[..., Any], target: Any, option: str, said: str
) -> None:
    with checkpointing(tmp_path) as ckpt:
        ckpt.step(SAVED)
    with pytest.raises(fp.TargetMismatchError, match=f"{option}=True(.|\n)*{said}"):
        restore(tmp_path, target)
    found = restore(tmp_path, target, **{option: True})
    assert found["w"].dtype == target["w"].dtype
    assert_equal(found["w"], np.ones(2))
    assert len(found["layers"]) == len(target["layers"])
    assert found.get("last_batch") is target.get("last_batch")


def test_all_leaves_that_only_one_side_has_are_told(tmp_path: Path) -> None:
    params = weights(1)
    with checkpointing(tmp_path, **EVERY_STEP) as ckpt:
        ckpt.step({"params": params, "opt_state": optax.adam(1e-3).init(params)})
    target = {"params": {"v": jnp.zeros(2)}, "opt_state": optax.adam(1e-3).init(params), "n": 0}
    with pytest.raises(fp.TargetMismatchError) as told:
        by_checkpointing(tmp_path, target)
    for name in ("params.v", "n"):
        assert f"'{name}' is not in the checkpoint" in str(told.value)
    assert "'params.w' is not in the target" in str(told.value)
    assert fp.steps(tmp_path) == [1]


def test_nothing_is_trained_on_a_part_of_a_model_in_silence(tmp_path: Path) -> None:
    """What would remove the larger one: the new run keeps the last checkpoint only."""
    with checkpointing(tmp_path, keep_last=1, **EVERY_STEP) as ckpt:
        ckpt.step(SAVED)
    with (
        pytest.raises(fp.TargetMismatchError),
        checkpointing(tmp_path, keep_last=1, **EVERY_STEP) as ckpt,
    ):
        ckpt.step(ckpt.restore(LESS))
    assert_equal(fp.load(tmp_path / "1"), SAVED)


# From which checkpoint.

WAYS: Any = {
    "latest": lambda _: "latest",
    "best": lambda _: "best",
    "a step": lambda _: 3,
    "a path": lambda directory: directory / "3",
    "a path as text": lambda directory: f"{directory}/3",
}


@pytest.mark.parametrize("way", WAYS)
def test_any_checkpoint_is_gone_on_from_with_its_own_step(tmp_path: Path, way: str) -> None:
    trained(tmp_path, 4)
    step = {"latest": 4, "best": 2}.get(way, 3)
    with checkpointing(tmp_path, monitor="loss", **EVERY_STEP) as ckpt:
        state = ckpt.restore(weights(0), which=WAYS[way](tmp_path), discard_later=True)
        assert_equal(state, weights(step))
        assert (ckpt.steps_done, ckpt.callback.restored.step) == (step, step)  # type: ignore[union-attr]
        assert fp.steps(tmp_path) == list(range(1, step + 1))
        ckpt.step(weights(10))
    assert fp.steps(tmp_path) == list(range(1, step + 2))
    assert_equal(fp.load(tmp_path / str(step + 1)), weights(10))


def test_a_checkpoint_of_elsewhere_keeps_its_step(tmp_path: Path) -> None:
    trained(tmp_path / "one", 3)
    with checkpointing(tmp_path / "two", **EVERY_STEP) as ckpt:
        ckpt.restore(weights(0), which=tmp_path / "one" / "3")
        ckpt.step(weights(4))
    assert fp.steps(tmp_path / "two") == [4]
    with checkpointing(tmp_path / "two", **EVERY_STEP) as ckpt:
        fp.save(tmp_path / "one" / "4", weights(0), custom_metadata={"step": 4})
        fp.finalize(tmp_path / "one" / "4")
        with pytest.raises(fp.CheckpointExistsError, match="holds step 4 already"):
            ckpt.restore(weights(0), which=tmp_path / "one" / "4")  # it is not that of here
    assert fp.steps(tmp_path / "one") == [1, 2, 3, 4]


def test_going_back_is_refused_at_once_unless_it_is_asked_for(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    with checkpointing(tmp_path, **EVERY_STEP) as ckpt:
        with pytest.raises(fp.CheckpointExistsError, match=r"holds step 3.*discard_later=True"):
            ckpt.restore(weights(0), which=1)
        with pytest.raises(fp.TargetMismatchError):
            ckpt.restore({"v": jnp.zeros(2)}, which=1, discard_later=True)
        assert fp.steps(tmp_path) == [1, 2, 3]  # nothing goes before what is left is loaded
        ckpt.restore(weights(0), which=1, discard_later=True)
    assert fp.steps(tmp_path) == [1]


def test_later_checkpoints_that_are_read_meanwhile_stay(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    refused: list[bool] = []

    def look(_done: int, _total: int) -> None:
        if not refused:
            refused.append(True)
            with checkpointing(tmp_path) as ckpt, pytest.raises(fp.CheckpointInUseError):
                ckpt.restore(weights(0), which=1, discard_later=True)

    fp.load(tmp_path / "2", weights(0), progress=look)
    assert refused
    assert fp.steps(tmp_path) == [1, 2]


def test_who_looks_at_a_run_that_lives_cannot_discard_its_checkpoints(tmp_path: Path) -> None:
    with checkpointing(tmp_path, **EVERY_STEP) as ckpt:
        for step in range(1, 4):
            ckpt.step(weights(step))
        ckpt.callback.finalizer.wait()
        looks = PartialCheckpointCallback(tmp_path)
        assert restored(looks, weights(0), which=1)[1] == 1
        with pytest.raises(fp.CheckpointInUseError, match="Another run trains there"):
            looks.restore(weights(0), which=1, discard_later=True)
    assert fp.steps(tmp_path) == [1, 2, 3]


def test_an_older_step_may_be_looked_at_but_not_trained_from(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    callback = PartialCheckpointCallback(tmp_path, **EVERY_STEP)
    assert restored(callback, weights(0), which=1)[1] == 1
    trainer = StubTrainer()
    trainer.global_step = 1
    with pytest.raises(fp.CheckpointExistsError, match="holds step 3 already"):
        callback.on_fit_start(trainer, None)
    assert restored(callback, weights(0), which=1, discard_later=True)[1] == 1
    callback.on_fit_start(trainer, None)
    end_step(callback, trainer, 2)
    callback.on_train_end(trainer, None)
    assert fp.steps(tmp_path) == [1, 2]


def test_a_misspelt_way_to_choose_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, 1)
    callback = PartialCheckpointCallback(tmp_path)
    with pytest.raises(ValueError, match="which='newest'"):
        callback.restore(which="newest")
    with pytest.raises(fp.NoSessionError, match="holds steps 1"):
        callback.restore(which=tmp_path / "7")
    fp.save(tmp_path / "other", weights(0))
    fp.finalize(tmp_path / "other")
    with pytest.raises(ValueError, match="which step"):
        callback.restore(which=tmp_path / "other")


# How far training is.


def test_epochs_and_steps_of_an_epoch_go_on(tmp_path: Path) -> None:
    def epochs(stop_after: int | None = None) -> list[tuple[int, int]]:
        """Three epochs of four steps each, as they are trained."""
        seen = []
        with checkpointing(tmp_path, **EVERY_STEP) as ckpt:
            ckpt.restore(weights(0))
            for epoch in range(ckpt.epochs_done, 3):
                for batch in range(ckpt.step_in_epoch, 4):
                    seen.append((epoch, batch))
                    ckpt.step(weights(ckpt.steps_done + 1))
                    if len(seen) == stop_after:
                        return seen
                ckpt.end_epoch(epoch)
        return seen

    seen = [*epochs(3), *epochs(1), *epochs(2), *epochs()]
    assert seen == [(epoch, batch) for epoch in range(3) for batch in range(4)]
    assert fp.steps(tmp_path) == list(range(1, 13))
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(weights(0))
        assert (ckpt.steps_done, ckpt.epochs_done, ckpt.step_in_epoch) == (12, 2, 4)


def test_an_epoch_that_ended_with_its_checkpoint_is_done(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_epochs=1) as ckpt:
        for epoch in range(2):
            ckpt.step(weights(epoch))
            ckpt.step(weights(epoch))
            ckpt.end_epoch(epoch)
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(weights(0))
        assert (ckpt.steps_done, ckpt.epochs_done, ckpt.step_in_epoch) == (4, 2, 0)
        assert fp.metadata(tmp_path / "4").training["epoch"] == 1


def test_the_progress_that_earlier_versions_stored_among_custom_metadata_is_read(
    tmp_path: Path,
) -> None:
    progress = {"epochs_done": 2, "steps_of_epoch": 3}
    fp.save(tmp_path / "9", weights(9), custom_metadata={"step": 9, "progress": progress})
    fp.finalize(tmp_path / "9")
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(weights(0))
        assert (ckpt.steps_done, ckpt.epochs_done, ckpt.step_in_epoch) == (9, 2, 3)


def test_of_what_others_wrote_only_the_step_is_known(tmp_path: Path) -> None:
    fp.save(tmp_path / "5", weights(5), custom_metadata={"progress": 7, "extras": [], "epoch": "x"})
    fp.finalize(tmp_path / "5")
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(weights(0))
        assert (ckpt.steps_done, ckpt.epochs_done, ckpt.step_in_epoch) == (5, 0, 0)


def test_a_call_that_raised_may_be_repeated_and_is_counted_once(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    with checkpointing(tmp_path, **EVERY_STEP) as ckpt:
        for _ in range(2):
            with pytest.raises(fp.CheckpointExistsError):
                ckpt.step(weights(1))  # restore was forgotten
            assert ckpt.steps_done == 0
        ckpt.restore(weights(0))
        with pytest.raises(fp.UnsupportedLeafError):
            ckpt.step({"w": object()})
        assert ckpt.steps_done == 2


@pytest.mark.parametrize("monitor", [None, "val_loss"], ids=["at-once", "waits-for-its-score"])
def test_a_step_that_could_not_be_saved_is_saved_when_it_is_repeated(
    tmp_path: Path, monitor: str | None
) -> None:
    in_the_way = tmp_path / "run" / "2.partial_save"
    with checkpointing(tmp_path / "run", **EVERY_STEP, monitor=monitor) as ckpt:
        ckpt.step(weights(1))
        assert ckpt.save_now().is_dir()
        in_the_way.touch()
        for _ in range(2):
            with pytest.raises(fp.CheckpointExistsError, match="is in the way"):
                ckpt.step(weights(2))
            assert ckpt.save_now() == tmp_path / "run" / "1"  # the newest that is finished
        in_the_way.unlink()
        ckpt.step(weights(2))
        assert ckpt.save_now().is_dir()
    assert fp.steps(tmp_path / "run") == [1, 2]


def test_a_second_block_goes_on_counting(tmp_path: Path) -> None:
    ckpt = checkpointing(tmp_path, every_n_train_steps=100)
    for _ in range(2):
        with ckpt:
            for _ in range(3):
                ckpt.step(weights(0))
    assert fp.steps(tmp_path) == [3, 6]


def test_what_is_gone_on_from_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="flax_partial")
    with checkpointing(tmp_path, **EVERY_STEP) as ckpt:
        ckpt.restore(weights(0))
        ckpt.step(weights(0))
    assert f"no checkpoint in {tmp_path} to restore" in caplog.text
    caplog.clear()
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(weights(0))
    assert f"Restored step 1 from {tmp_path}/1" in caplog.text


# Where a run is.


def test_a_run_stays_where_it_began_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with checkpointing("run", **EVERY_STEP) as ckpt:
        ckpt.step(weights(1))
        monkeypatch.chdir("elsewhere")
        ckpt.step(weights(2))
    assert not any(Path().iterdir())
    assert fp.steps(tmp_path / "run") == [1, 2]
    assert ckpt.callback.last_model_path == str(tmp_path / "run" / "2")


def test_the_home_directory_is_meant_by_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    trained(Path("~/run"), 1)
    fp.save("~/run/2", weights(2))
    fp.finalize("~/run/2")
    assert fp.steps(tmp_path / "home" / "run") == fp.steps("~/run") == [1, 2]
    assert [path.name for path in Path().iterdir()] == ["home"]


@pytest.mark.parametrize("place", ["1", "1/more", "1/state/run", "2.partial_save/run"])
def test_a_directory_in_a_checkpoint_is_refused(tmp_path: Path, place: str) -> None:
    trained(tmp_path, 1)
    fp.save(tmp_path / "2", weights(2))
    with pytest.raises(ValueError, match=f"checkpoint.*holds checkpoints, such as {tmp_path}."):
        checkpointing(tmp_path / place)


def test_empty_path_is_not_taken_for_the_working_directory() -> None:
    with pytest.raises(ValueError, match="is empty"):
        checkpointing("")


def test_what_was_probably_meant_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path / "lm", 2)
    trained(tmp_path / "mt", 7)
    for path, said in (
        ("lm", f"It is a run: its newest checkpoint is {tmp_path}/lm/2, its steps are 1, 2."),
        ("mt", f"checkpoint is {tmp_path}/mt/7, its steps are ..., 3, 4, 5, 6, 7."),
        ("lm/3", f"{tmp_path}/lm holds steps 1, 2."),
        ("lmm", f"There is {tmp_path}/lm."),
        ("lm/2/state/x", f"lies in the checkpoint {tmp_path}/lm/2."),
        ("", "It holds runs: lm (steps 1, 2), mt (steps ..., 3, 4, 5, 6, 7)."),
    ):
        with pytest.raises(fp.NoSessionError) as told:
            fp.load(tmp_path / path)
        assert said in str(told.value)
    for call, error, said in (
        (fp.status, fp.NoSessionError, "lm is a run's directory"),
        (fp.abort, fp.NoSessionError, "lm is a run's directory"),
        (fp.remove, fp.NoSessionError, f"It is a run: its newest checkpoint is {tmp_path}/lm/2"),
        (partial(fp.save, state={"w": 1}), fp.CheckpointExistsError, f"as {tmp_path}/lm/STEP."),
    ):
        with pytest.raises(error, match=re.escape(said)):
            call(tmp_path / "lm")
    fp.save(tmp_path / "x", {"w": 1})
    with pytest.raises(fp.KeyConflictError) as refused:
        fp.save(tmp_path / "x", {"w": 1})
    assert refused.value.__notes__ == [f"This is about {tmp_path / 'x.partial_save'}."]
    caplog.set_level(logging.INFO, logger="flax_partial")
    assert PartialCheckpointCallback(tmp_path).restore() is None
    assert "It holds runs: lm (steps 1, 2)" in caplog.text


def test_training_that_starts_below_later_steps_is_refused_after_its_first(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    callback = PartialCheckpointCallback(tmp_path, every_n_train_steps=1000)
    trainer = begun(callback)
    for step in (1, 2):  # also where the first error was caught
        with pytest.raises(
            fp.CheckpointExistsError, match=r"Restore the newest.*another directory"
        ):
            end_step(callback, trainer, step)
