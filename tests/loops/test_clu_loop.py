"""A loop of CLU's periodic actions goes on where it stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import pytest
from small_model import assert_equal, new_state, train

import flax_partial as fp

pytest.importorskip("clu", reason="pip install 'flax-partial[clu]'")

from clu import periodic_actions

from flax_partial.callbacks.clu import CluCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 10


def run(directory: Path, *, stop_before: int = STEPS + 1, **options: Any) -> Any:
    """Ten steps, from the newest checkpoint, beside an action of CLU's own."""
    with CluCheckpoint(directory, on_steps=[STEPS], **options) as checkpoints:
        state, first = checkpoints.restore(new_state())
        report = periodic_actions.PeriodicCallback(every_steps=2, callback_fn=lambda **_: None)
        for step in range(first, STEPS + 1):
            if step == stop_before:
                raise KeyboardInterrupt
            state, loss = train(state, jnp.float32(step) / jnp.float32(7))
            report(step)
            assert checkpoints(step, state=state, metrics={"loss": loss}) == (step in (3, 6, 9, 10))
    return state


def uninterrupted() -> Any:
    state = new_state()
    for step in range(1, STEPS + 1):
        state, _ = train(state, jnp.float32(step) / jnp.float32(7))
    return state


def test_it_is_a_periodic_action_that_saves_when_it_triggers(tmp_path: Path) -> None:
    assert issubclass(CluCheckpoint, periodic_actions.PeriodicAction)
    run(tmp_path, every_steps=3)
    assert fp.steps(tmp_path) == [3, 6, 9, 10]
    assert set(fp.metadata(tmp_path / "9").custom_metadata["metrics"]) == {"loss"}
    assert_equal(fp.load(tmp_path / "10"), uninterrupted())


@pytest.mark.parametrize("stop_before", [1, 3, 4, 8])
def test_stopped_and_run_again_ends_bit_identical(tmp_path: Path, stop_before: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, every_steps=3, stop_before=stop_before)
    assert_equal(run(tmp_path, every_steps=3), uninterrupted())
    assert_equal(fp.load(tmp_path / "10"), uninterrupted())


def test_time_triggers_it_too(tmp_path: Path) -> None:
    with CluCheckpoint(tmp_path, every_secs=10, keep_last=1) as action:
        saved = [action(step, t=4.0 * step, state=new_state()) for step in range(1, 9)]
    assert saved == [False, False, False, True, False, False, True, False]
    assert fp.steps(tmp_path) == [7]


def test_called_like_all_the_others_it_takes_the_state_itself(tmp_path: Path) -> None:
    state = new_state()
    with CluCheckpoint(tmp_path, every_steps=2, take_state=lambda: state) as action:
        hooks = [periodic_actions.ReportProgress(every_steps=2), action]
        for step in (1, 2):
            for hook in hooks:
                hook(step)
    assert_equal(fp.load(tmp_path / "2"), new_state())


def test_going_back_and_a_call_that_is_repeated_are_no_gaps_for_clu(tmp_path: Path) -> None:
    action = CluCheckpoint(tmp_path, every_steps=1)
    with action:
        for step in (1, 2, 3):
            action(step, state={"w": step})
        with pytest.raises(fp.CheckpointExistsError):
            action.restore({"w": 0}, which=1)
        assert action.restore({"w": 0}, which=1, discard_later=True) == ({"w": 1}, 2)
        with pytest.raises(fp.UnsupportedLeafError):
            action(2, state={"w": object()})
        action(2, state={"w": 5})
        action(3, state={"w": 6})
    assert fp.load(tmp_path / "3") == {"w": 6}


def test_a_step_without_any_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no state"), CluCheckpoint(tmp_path, every_steps=1) as save:
        save(1)


def test_never_triggering_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing would be saved"):
        CluCheckpoint(tmp_path)
