"""An adapter's options are the callback's, by name: in `help`, in type checkers, and in errors."""

from __future__ import annotations

import inspect
import json
import pydoc
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import pytest
import stub_trainer
from small_model import assert_equal, new_state
from stub_trainer import Loop, StubTrainer

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback, checkpointing
from flax_partial.callbacks._options import LoopOptions, UnscheduledOptions
from flax_partial.callbacks.blaxbird import BlaxbirdCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

OF_CALLBACK = inspect.signature(PartialCheckpointCallback).parameters
SCHEDULE = {"every_n_epochs", "every_n_train_steps", "train_time_interval", "save_initial"}


def test_typed_options_are_those_of_the_callback() -> None:
    assert LoopOptions.__optional_keys__ == OF_CALLBACK.keys() - {"directory", "state_fn"}
    assert UnscheduledOptions.__optional_keys__ == LoopOptions.__optional_keys__ - SCHEDULE


@pytest.mark.parametrize("adapter", [checkpointing, BlaxbirdCheckpoint])
def test_help_shows_each_option_with_what_the_callback_says_of_it(adapter: Any) -> None:
    shown = inspect.signature(adapter).parameters
    assert list(shown) == [name for name in OF_CALLBACK if name != "state_fn"]
    assert shown["keep_last"] == OF_CALLBACK["keep_last"]
    assert shown["every_n_epochs"].default == (1 if adapter is checkpointing else None)
    text = pydoc.render_doc(adapter, renderer=pydoc.plaintext)
    for name in shown:
        assert f"  {name}: " in text
    assert "  options: How parts are written." in text
    assert text.count("Keep so many of the newest checkpoints.") == 1
    assert "ValueError: An option" in text


def test_help_of_the_hook_shows_what_a_user_calls() -> None:
    text = pydoc.render_doc(FinalizeHook, renderer=pydoc.plaintext)
    assert [name for name in vars(FinalizeHook) if not name.startswith("_")] == ["reports", "wait"]
    assert "timeout_secs: For how many seconds" in text


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: checkpointing("run", every_n_step=5), r"^checkpointing\(\) has no option"),
        (lambda: checkpointing("run", every_n_step=5), "'every_n_train_steps'"),
        (lambda: checkpointing("run", state_fn=len), "has no option 'state_fn'"),
        (lambda: BlaxbirdCheckpoint("run", keeplast=5), "^BlaxbirdCheckpoint.* mean 'keep_last'"),
        (lambda: checkpointing("run").restore({}, whch=5), r"^checkpointing.restore\(\) .*'which'"),
    ],
)
def test_an_unknown_option_is_named_with_the_class_and_a_close_one(call: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        call()


def test_metadata_of_the_run_and_of_the_step_are_stored(tmp_path: Path) -> None:
    of_run = {"commit": "abc", "who": "run"}
    with checkpointing(tmp_path, every_n_train_steps=1, custom_metadata=of_run) as ckpt:
        ckpt.step(new_state(), custom_metadata={"tokens": 5, "who": "step"})
        ckpt.step(new_state())
    first, second = (fp.metadata(tmp_path / step).custom_metadata for step in "12")
    assert first == {"commit": "abc", "tokens": 5, "who": "step"}
    assert second == of_run  # and nothing of the callback's
    for_orbax = json.loads((tmp_path / "1" / "_CHECKPOINT_METADATA").read_text())
    assert for_orbax["custom_metadata"] == first
    with pytest.raises(ValueError, match="custom_metadata has 'metrics'"):
        checkpointing(tmp_path, custom_metadata={"metrics": {}})


def test_a_loop_over_cells_is_ended_by_close(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt = checkpointing(tmp_path, every_n_train_steps=100)
    with pytest.raises(ValueError, match=r"checkpointing.save_now\(\) knows no state yet"):
        ckpt.save_now()
    state = ckpt.restore(new_state())
    assert ckpt.save_now() == tmp_path / "0"
    for _ in range(3):
        ckpt.step(state)
    assert ckpt.save_now() == ckpt.save_now() == tmp_path / "3"
    assert fp.steps(tmp_path) == [0, 3]
    ckpt.step(state)
    ckpt.close()
    ckpt.close()
    assert fp.steps(tmp_path) == [0, 3, 4]
    assert caplog.text.count("is not in a `with` block: call close()") == 1
    caplog.clear()
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(new_state())
    assert "close()" not in caplog.text


def test_the_initial_state_is_saved_once_and_restored(tmp_path: Path) -> None:
    first = new_state()
    for _ in range(2):
        with checkpointing(tmp_path, save_initial=True) as ckpt:
            assert_equal(ckpt.restore(new_state()), first)
            assert ckpt.steps_done == 0
    assert fp.steps(tmp_path) == [0]
    assert fp.metadata(tmp_path / "0").training["progress"]["epochs_done"] == 0
    with checkpointing(tmp_path, save_initial=True, every_n_train_steps=1) as ckpt:
        ckpt.restore(new_state())
        ckpt.step(new_state())
    assert fp.steps(tmp_path) == [0, 1]


def test_a_trainer_has_its_initial_state_saved(tmp_path: Path) -> None:
    hook = FinalizeHook()
    options: Any = {"save_initial": True, "finalizer": hook}
    halves = [
        PartialCheckpointCallback(tmp_path, state_fn=state_fn, **options)
        for state_fn in (lambda trainer, _: {"seen": trainer.state["seen"]}, None)
    ]
    Loop(*halves).fit()
    assert fp.steps(tmp_path) == [0, 2]
    assert fp.load(tmp_path / "0")["seen"] == 0
    assert_equal(fp.load(tmp_path / "0"), stub_trainer.new_state(0))


def test_overwriting_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps in (3, 2):
        with checkpointing(tmp_path, every_n_train_steps=1, overwrite=True) as ckpt:
            state = ckpt.restore({"w": jnp.full(2, float(steps))})
            assert (ckpt.steps_done, state["w"][0]) == (0, steps)
            for _ in range(steps):
                ckpt.step(state)
    assert fp.steps(tmp_path) == [1, 2]
    assert fp.load(tmp_path / "1")["w"][0] == 2
    assert f"Removed {tmp_path / '3'}: training begins at step 0." in caplog.text
    with (
        checkpointing(tmp_path) as ckpt,
        pytest.raises(fp.CheckpointExistsError, match="overwrite"),
    ):
        ckpt.step({"w": jnp.zeros(2)})


def test_overwriting_from_a_restored_step_removes_the_later_ones(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_train_steps=1) as ckpt:
        for _ in range(3):
            ckpt.step({"w": jnp.zeros(2)})
    callback = PartialCheckpointCallback(tmp_path, overwrite=True)
    trainer = StubTrainer()
    trainer.state, trainer.global_step = callback.restore(which=2)
    callback.setup(trainer, None, "fit")
    callback.on_fit_start(trainer, None)
    assert fp.steps(tmp_path) == [1, 2]
    callback.teardown(trainer, None, "fit")
