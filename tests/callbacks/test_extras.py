"""What has a state of its own is saved beside the arrays, and set with them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import assert_equal

import flax_partial as fp
from flax_partial.callbacks import checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = {"w": jnp.zeros(2)}
EVERY_STEP: Any = {"every_n_train_steps": 1, "every_n_epochs": None}


class Counter:
    """Counts, and has its state got and set by methods of any name."""

    def __init__(self, get: str, set_: str) -> None:
        self.count: Any = 0
        setattr(self, get, lambda: self.count)
        setattr(self, set_, lambda state: setattr(self, "count", state))

    def next(self) -> int:
        self.count += 1
        return int(self.count)


def counter(get: str, set_: str) -> Any:
    one = Counter(get, set_)
    return one, one.next


def generator(kind: Any) -> Any:
    one = kind(3)
    return one, lambda: one.integers(1 << 62)


def of_random() -> Any:
    one = random.Random(3)  # noqa: S311
    return one, one.random


def of_module() -> Any:
    random.seed(3)
    return random, random.random


def legacy() -> Any:
    one = np.random.RandomState(3)
    return one, one.rand


def functions() -> Any:
    one, take = counter("a", "b")
    return (one.a, one.b), take


KINDS: dict[str, Callable[[], Any]] = {
    "get_state": lambda: counter("get_state", "set_state"),
    "state_dict": lambda: counter("state_dict", "load_state_dict"),
    "to_json": lambda: counter("to_json", "from_json"),
    "two functions": functions,
    "random.Random": of_random,
    "random": of_module,
    "np.random.RandomState": legacy,
    "np.random.default_rng": lambda: generator(np.random.default_rng),
    "np.random.MT19937": lambda: generator(
        lambda seed: np.random.Generator(np.random.MT19937(seed))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_where_the_checkpoint_was_made(tmp_path: Path, kind: str) -> None:
    thing, take = KINDS[kind]()
    with checkpointing(tmp_path, extras={"data": thing}, **EVERY_STEP) as ckpt:
        for _ in range(3):
            take()
            ckpt.step(WEIGHTS)
        want = [take() for _ in range(3)]  # after the last checkpoint
    again, take = KINDS[kind]()
    with checkpointing(tmp_path, extras={"data": again}) as ckpt:
        ckpt.restore(WEIGHTS)
        assert [take() for _ in range(3)] == want
        ckpt.restore(WEIGHTS, which=2, discard_later=True)
        take()
        assert [take() for _ in range(3)] == want


STATES: dict[str, Any] = {
    "nested": {"a": [1, (2, None), {"b": b"\x00\xff"}], 3: True, (1, 2): "\ud800"},
    "large": 1 << 200,
    "floats": [float("inf"), -0.0, 1e-300],
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "scalar": np.uint8(7),
    "empty": {},
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    found: list[Any] = []
    pair = (lambda: STATES[name], found.append)
    with checkpointing(tmp_path, extras={"x": pair}) as ckpt:
        ckpt.step(WEIGHTS)
    with checkpointing(tmp_path, extras={"x": pair}) as ckpt:
        ckpt.restore(WEIGHTS)
    assert type(found[0]) is type(STATES[name])
    assert_equal(found, [STATES[name]]) if name == "array" else None
    assert repr(found) == repr([STATES[name]])


def test_the_tree_of_arrays_is_as_the_user_made_it(tmp_path: Path) -> None:
    with checkpointing(tmp_path, extras={"data": random.Random(1)}) as ckpt:  # noqa: S311
        ckpt.step(WEIGHTS)
    assert list(fp.metadata(tmp_path / "1").leaves) == ["w"]
    assert_equal(fp.load(tmp_path / "1", WEIGHTS), WEIGHTS)


def test_what_has_no_state_or_one_that_cannot_be_stored_is_told_before_training(
    tmp_path: Path,
) -> None:
    with pytest.raises(TypeError, match=r"extras\['data'\] is list.*get_state and set_state"):
        checkpointing(tmp_path, extras={"data": [1]})
    ckpt = checkpointing(tmp_path, extras={"data": (lambda: {"a": {1, 2}}, print)})
    with pytest.raises(fp.UnsupportedLeafError, match="'data' holds a set"):
        ckpt.step(WEIGHTS)
    assert not any(tmp_path.iterdir())


def test_extras_that_only_one_side_has_are_told(tmp_path: Path) -> None:
    with checkpointing(tmp_path, extras={"data": random.Random(1)}) as ckpt:  # noqa: S311
        ckpt.step(WEIGHTS)
    other = random.Random(2)  # noqa: S311
    before = other.getstate()
    with checkpointing(tmp_path, extras={"other": other}) as ckpt:
        with pytest.raises(fp.TargetMismatchError) as told:
            ckpt.restore(WEIGHTS)
        assert "'other' is not in the checkpoint" in str(told.value)
        assert "'data' is not among the callback's extras" in str(told.value)
        ckpt.restore(WEIGHTS, partial=True, keep_missing=True)
    assert other.getstate() == before


def test_states_of_another_number_of_processes_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    metadata = {
        "extras": {"data": {"0": "7", "1": "9"}},
        "session": {"processes": 2},
    }
    fp.save(tmp_path / "1", WEIGHTS, training=metadata)
    fp.finalize(tmp_path / "1")
    found: list[Any] = []
    with checkpointing(tmp_path, extras={"data": (lambda: 0, found.append)}) as ckpt:
        with pytest.raises(fp.TargetMismatchError, match="by 2 processes, and there are 1 now"):
            ckpt.restore(WEIGHTS)
        ckpt.restore(WEIGHTS, keep_missing=True)
        assert not found
        assert ckpt.steps_done == 1


def test_what_is_saved_because_training_failed_has_the_state_of_its_own_step(
    tmp_path: Path,
) -> None:
    data = random.Random(1)  # noqa: S311
    ckpt = checkpointing(
        tmp_path, extras={"data": data}, every_n_train_steps=100, save_on_exception=True
    )
    wanted: list[float] = []

    def train() -> None:
        data.random()
        ckpt.step(WEIGHTS)
        wanted.append(data.random())  # for a step that fails
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ckpt:
        train()
    again = random.Random(5)  # noqa: S311
    with checkpointing(tmp_path, extras={"data": again}) as ckpt:
        ckpt.restore(WEIGHTS)
    assert [again.random()] == wanted
