"""Callbacks are copied and pickled as what they were made of: trainers do both."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from stub_trainer import Loop, begun, fitted, new_state
from test_callback import assert_is_step

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, LatestN, PartialCheckpointCallback, checkpointing

if TYPE_CHECKING:
    from pathlib import Path


def pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))  # noqa: S301 - it is our own


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copy_trains_as_the_callback_would_have(tmp_path: Path, copied: Any) -> None:
    hook = FinalizeHook(timeout_secs=7)
    callbacks = [
        PartialCheckpointCallback(tmp_path, keep=LatestN(1), finalizer=hook, monitor="loss"),
        PartialCheckpointCallback(tmp_path, finalizer=hook),
    ]
    one, two = copied(callbacks)
    assert one.finalizer is two.finalizer is not hook
    assert [one.state_key, two.state_key] == [callback.state_key for callback in callbacks]
    Loop(one, two, epochs=2).fit()
    assert fp.steps(tmp_path) == [4]
    assert_is_step(tmp_path / "4", 4)


def test_copy_of_a_callback_that_trains_is_as_good_as_new(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path)
    trainer = begun(callback)
    again = copy.deepcopy(callback)
    callback.on_train_end(trainer, None)
    Loop(again).fit()
    assert fp.steps(tmp_path) == [2]


def test_loop_is_copied_too(tmp_path: Path) -> None:
    with copy.deepcopy(checkpointing(tmp_path, every_n_train_steps=1)) as ckpt:
        ckpt.step(new_state(0))
    assert fp.steps(tmp_path) == [1]


def test_callbacks_of_two_directories_have_keys_of_their_own(tmp_path: Path) -> None:
    one, two = (fitted(tmp_path / name) for name in "ab")
    assert one.state_key != two.state_key
