"""A plain `for` loop goes on where it stopped, however it stopped."""

from __future__ import annotations

import enum
import gc
import weakref
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import assert_equal, new_state, run_until_killed, train

import flax_partial as fp
from flax_partial.callbacks import checkpointing

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 10


def batch_of(step: int) -> jax.Array:
    return jnp.float32(step) / jnp.float32(7)


def run(directory: Path, *, stop: BaseException | None = None, at: int = STEPS) -> Any:
    """Ten steps in all, from the newest checkpoint; `stop` is raised before step number `at`."""
    with checkpointing(directory, every_n_train_steps=3, monitor="loss") as ckpt:
        state = ckpt.restore(new_state())
        for step in range(ckpt.steps_done, STEPS):
            if stop is not None and step == at:
                raise stop
            state, loss = train(state, batch_of(step))
            ckpt.step(state, metrics={"loss": loss})
    return jax.tree.map(np.asarray, state)


def uninterrupted() -> Any:
    state = new_state()
    for step in range(STEPS):
        state, _ = train(state, batch_of(step))
    return state


def test_every_nth_step_and_the_last_are_saved_with_their_metrics(tmp_path: Path) -> None:
    state = run(tmp_path)
    assert fp.steps(tmp_path) == [3, 6, 9, 10]
    assert_equal(fp.load(tmp_path / "10"), state)
    metrics = fp.metadata(tmp_path / "9").custom_metadata["metrics"]
    assert set(metrics) == {"loss"}
    assert_equal(state, uninterrupted())


@pytest.mark.parametrize(
    "stop", [ValueError("wrong"), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
@pytest.mark.parametrize("at", [0, 2, 6, 8])
def test_stopped_by_an_exception_and_run_again_ends_bit_identical(
    tmp_path: Path, stop: BaseException, at: int
) -> None:
    with pytest.raises(type(stop)) as raised:
        run(tmp_path, stop=stop, at=at)
    assert raised.value is stop
    assert fp.steps(tmp_path) == list(range(3, at + 1, 3))
    assert_equal(run(tmp_path), uninterrupted())
    assert fp.steps(tmp_path)[-1] == STEPS


def test_after_the_block_any_checkpoint_may_be_looked_at(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_train_steps=3, monitor="loss") as ckpt:
        state = new_state()
        for step in range(6):
            state, _ = train(state, batch_of(step))
            ckpt.step(state, metrics={"loss": step})
    best = ckpt.restore(new_state(), which="best")
    assert_equal(best, fp.load(tmp_path / "3"))
    assert ckpt.steps_done == 3
    assert fp.steps(tmp_path) == [3, 6]


_KILLED = """
import os, signal, sys
from pathlib import Path
import test_plain_loop as loop

counted, real = 0, loop.train

def train(state, batch):
    global counted
    counted += 1
    if counted == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(state, batch)

loop.train = train
loop.run(Path(sys.argv[1]))
"""


def test_killed_and_run_again_ends_bit_identical(tmp_path: Path) -> None:
    run_until_killed(_KILLED, __file__, tmp_path)
    assert set(fp.steps(tmp_path)) <= {3, 6}
    assert_equal(run(tmp_path), uninterrupted())


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert_equal(run(tmp_path, stop=ValueError("a step was done"), at=0), first)
    assert fp.steps(tmp_path) == [3, 6, 9, 10]


def test_the_last_step_is_not_saved_where_no_epoch_is(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_train_steps=2, every_n_epochs=None) as ckpt:
        for _ in range(3):
            ckpt.step(new_state())
    assert fp.steps(tmp_path) == [2]


def test_each_block_of_one_object_is_a_loop_whose_last_step_is_saved(tmp_path: Path) -> None:
    ckpt = checkpointing(tmp_path, every_n_train_steps=10)
    for _ in range(2):
        with ckpt:
            state = ckpt.restore(new_state())
            for _ in range(14):
                ckpt.step(state)
    assert fp.steps(tmp_path) == [10, 14, 20, 28]


@pytest.mark.parametrize("earlier", [2, 9], ids=["a shorter run", "a longer run"])
def test_forgotten_restore_is_told_after_the_first_step(tmp_path: Path, earlier: int) -> None:
    fp.save(tmp_path / str(earlier), {"w": 1})
    fp.finalize(tmp_path / str(earlier))
    with checkpointing(tmp_path, every_n_train_steps=5) as ckpt:
        with pytest.raises(fp.CheckpointExistsError, match=f"holds step {earlier} already"):
            ckpt.step(new_state())
        ckpt.restore({"w": 0})
        ckpt.step({"w": 2})
    assert fp.steps(tmp_path)[-1] == earlier + 1


def test_directory_that_cannot_be_made_is_told_after_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ckpt = checkpointing(tmp_path / "file" / "run", every_n_train_steps=5)
    with pytest.raises(NotADirectoryError):
        ckpt.step(new_state())


BAD = {"w": 1, "loss_fn": print}


def test_state_that_cannot_be_saved_is_told_after_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seldom: Any = {"every_n_train_steps": 1000, "every_n_epochs": None}
    with checkpointing(tmp_path / "a", **seldom) as ckpt:
        with pytest.raises(fp.UnsupportedLeafError, match=r"'loss_fn'.*cannot be saved") as caught:
            ckpt.step(BAD)
        assert "No checkpoint is due yet" in caught.value.__notes__[0]
    with checkpointing(tmp_path / "b", on_save_error="warn", **seldom) as ckpt:
        for _ in range(3):
            ckpt.step(BAD)
    assert caplog.text.count("The first checkpoint") == 1


def test_directory_that_cannot_be_made_is_logged_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with checkpointing(
        tmp_path / "file" / "run", every_n_train_steps=2, on_save_error="warn"
    ) as ckpt:
        for _ in range(5):
            ckpt.step({"w": 1})
    assert ckpt.callback.failed_saves == 3
    assert "Nothing can be saved into" in caplog.text


def test_epochs_are_saved_with_the_metrics_of_the_epoch(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_epochs=2) as ckpt:
        for epoch in range(5):
            for _ in range(2):
                ckpt.step(new_state(), metrics={"loss": 9.0})
            ckpt.end_epoch(epoch, metrics={"accuracy": epoch})
    assert fp.steps(tmp_path) == [4, 8]
    found = fp.metadata(tmp_path / "8")
    assert found.custom_metadata == {"metrics": {"loss": 9.0, "accuracy": 3.0}}
    assert found.training["epoch"] == 3


def test_streamed_layers_are_saved_once_and_before_the_step_is_done(tmp_path: Path) -> None:
    with checkpointing(tmp_path, every_n_train_steps=2, every_n_epochs=None) as ckpt:
        for _ in range(2):
            state = new_state()
            ckpt.layer_ready("head", state["params"]["head"])
            ckpt.optimizer_state_ready("head", state["opt_state"]["head"])
            ckpt.step(state)
    (report,) = ckpt.callback.reports
    assert report.groups[:2] == ("params.head", "opt_state.head")
    assert_equal(fp.load(tmp_path / "2"), new_state())


def test_nnx_objects_are_restored_in_place(tmp_path: Path) -> None:
    def model(seed: int) -> nnx.Linear:
        return nnx.Linear(2, 3, rngs=nnx.Rngs(seed))

    with checkpointing(tmp_path) as ckpt:
        ckpt.step({"params": model(0)})
    other = model(1)
    with checkpointing(tmp_path) as ckpt:
        restored = ckpt.restore({"params": other})
        assert ckpt.steps_done == 1
    assert restored["params"] is other
    assert_equal(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model(0))))


def test_a_failed_save_is_raised_in_the_loop_or_where_the_block_ends(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(fp.UnsupportedLeafError),
        checkpointing(tmp_path / "run", every_n_train_steps=1) as ckpt,
    ):
        ckpt.step({"params": {"head": object()}})
    with (
        pytest.raises(fp.UnsupportedLeafError),
        checkpointing(tmp_path / "run", every_n_epochs=1) as ckpt,
    ):
        ckpt.step({"params": {"head": object()}})
    assert not fp.steps(tmp_path / "run")


class Text(str, enum.Enum):  # noqa: UP042 - `StrEnum` prints its text
    A = "a"


class Number(int, enum.Enum):
    ONE = 1


@pytest.mark.parametrize("key", [Text.A, Number.ONE])
def test_keys_may_be_members_of_enums(tmp_path: Path, key: Any) -> None:
    with checkpointing(tmp_path, every_n_train_steps=1) as ckpt:
        ckpt.step({"params": {key: jnp.zeros(3)}})
    assert set(fp.load(tmp_path / "1")["params"]) == {key.value}


def test_arrays_of_a_finalized_checkpoint_are_kept_by_nothing(tmp_path: Path) -> None:
    """Where steps do not donate, they would take the memory of one more state."""
    with checkpointing(tmp_path, every_n_train_steps=2) as ckpt:
        for step in range(1, 4):
            state = {"params": {"large": jnp.zeros(1 << 17), "small": jnp.zeros(3)}}
            ckpt.step(state)
            if step == 2:
                arrays = [weakref.ref(array) for array in jax.tree.leaves(state)]
                ckpt.callback.finalizer.wait()
        gc.collect()
        assert [array() for array in arrays] == [None, None]


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="every_n_step"):
        checkpointing(tmp_path, every_n_steps=3)
