"""blaxbird's own `train_fn` calls the hook; stopped, a new run of it goes on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from small_model import assert_equal
from small_net import Net, loss_of

import flax_partial as fp

pytest.importorskip("blaxbird", reason="pip install 'flax-partial[blaxbird]'")

from blaxbird import train_fn

from flax_partial.callbacks.blaxbird import BlaxbirdCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STEPS = 10


def new_optimizer(seed: int = 0) -> Any:
    return nnx.ModelAndOptimizer(Net(seed), optax.adam(0.1), wrt=nnx.Param)


def batches(start: int) -> Iterator[jax.Array]:
    return (jnp.full((2, 3), step / 7) for step in itertools.count(start))


def train(optimizer: Any, hooks: list[Any], *, done: int = 0) -> None:
    fit = train_fn(
        fns=(
            lambda model, _, batch: nnx.value_and_grad(loss_of)(model, batch),
            lambda model, _, batch: loss_of(model, batch),
        ),
        n_steps=STEPS - done,
        eval_every_n_steps=2,
        n_eval_batches=1,
        hooks=hooks,
    )
    fit(jax.random.key(0), optimizer, batches(done), batches(0))


def run(directory: Path, *, stop_at: int = STEPS + 1, seed: int = 0) -> Any:
    def stop(step: int, **_: Any) -> None:
        if step == stop_at:
            raise KeyboardInterrupt

    optimizer = new_optimizer(seed)
    with BlaxbirdCheckpoint(directory, every_n_train_steps=5, monitor="val/loss") as checkpoints:
        done = checkpoints.restore(optimizer)
        train(optimizer, [checkpoints, stop], done=done)
    return pure(optimizer)


def pure(optimizer: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(optimizer))


def uninterrupted() -> Any:
    optimizer = new_optimizer()
    train(optimizer, [])
    return pure(optimizer)


def test_saves_model_and_optimizer_with_blaxbirds_metrics(tmp_path: Path) -> None:
    assert_equal(run(tmp_path), uninterrupted())
    assert fp.steps(tmp_path) == [5, 10]
    metrics = fp.metadata(tmp_path / "5").custom_metadata["metrics"]
    assert set(metrics) == {"train/loss", "val/loss"}
    loaded = fp.load(tmp_path / "10", target={"params": uninterrupted()["model"]}, partial=True)
    assert_equal(loaded["params"], uninterrupted()["model"])
    leaves = fp.metadata(tmp_path / "10").leaves
    assert (
        len(leaves) == 3 * 4 + 3
    )  # each parameter once, its moments, two counts, Optax's empty state
    assert not any("model" in name for name in leaves)


@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_stopped_and_run_again_ends_bit_identical(tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=stop_at)
    assert fp.steps(tmp_path) == [5][: stop_at // 5]
    other_seed = 0 if stop_at < 5 else 1  # what is restored is all there is of the model
    assert_equal(run(tmp_path, seed=other_seed), uninterrupted())
    assert fp.steps(tmp_path) == [5, 10]


def test_a_second_run_and_going_back_count_on(tmp_path: Path) -> None:
    optimizer = new_optimizer()
    with BlaxbirdCheckpoint(tmp_path, every_n_train_steps=5) as checkpoints:
        for _ in range(2):
            train(optimizer, [checkpoints])
        with pytest.raises(fp.CheckpointExistsError):
            checkpoints.restore(optimizer, which=15)
        assert checkpoints.restore(optimizer, which=15, discard_later=True) == 15
        train(optimizer, [checkpoints])
    assert fp.steps(tmp_path) == [5, 10, 15, 20, 25]


def test_never_saving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing would be saved"):
        BlaxbirdCheckpoint(tmp_path)
