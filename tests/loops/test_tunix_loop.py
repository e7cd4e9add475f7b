"""tunix's own `PeftTrainer` calls the hooks; a new one goes on where it stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from small_model import assert_equal
from small_net import Net, loss_of

import flax_partial as fp

pytest.importorskip("tunix", reason="pip install 'flax-partial[tunix]'")

from tunix.sft import hooks, peft_trainer

from flax_partial.callbacks import checkpointing
from flax_partial.callbacks.tunix import TunixCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

STEPS = 7


def examples(count: int, stop_at: int | None) -> Iterator[dict[str, jax.Array]]:
    for number in range(count):
        if number == stop_at:
            raise KeyboardInterrupt
        yield {"x": jnp.full((8, 3), number / 7)}


def train(
    checkpoints: Any, *, seed: int = 0, rounds: int | None = None, stop_at: int | None = None
) -> Any:
    """Seven steps of `rounds` examples each; `stop_at` is the example that never comes."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=3, max_steps=STEPS, gradient_accumulation_steps=rounds
    )
    trainer = peft_trainer.PeftTrainer(Net(seed), optax.adam(0.1), config)
    trainer.with_loss_fn(loss_of)
    trainer.with_gen_model_input_fn(lambda example: {"x": example["x"]})
    if checkpoints is not None:
        trainer.with_training_hooks(checkpoints)
    count = (STEPS + 2) * (rounds or 1)
    trainer.train(examples(count, stop_at), [next(examples(1, None))])
    return pure(trainer)


def pure(trainer: Any) -> Any:
    return {
        "params": nnx.to_pure_dict(nnx.state(trainer.model)),
        "opt_state": nnx.to_pure_dict(nnx.state(trainer.optimizer)),
    }


def test_every_nth_step_and_the_last_are_saved(tmp_path: Path) -> None:
    checkpoints = TunixCheckpoint(tmp_path, every_n_train_steps=1, monitor="eval_loss")
    assert isinstance(checkpoints, hooks.TrainingHooks)
    state = train(checkpoints)
    assert fp.steps(tmp_path) == list(range(1, STEPS + 1))
    metrics = [
        [*fp.metadata(tmp_path / str(step)).custom_metadata["metrics"]] for step in range(2, STEPS)
    ]
    assert metrics == [["loss"], ["eval_loss"], ["loss"], ["loss"], ["eval_loss"]]
    assert_equal(fp.load(tmp_path / "7", target=state), state)
    assert_equal(state, train(None))


def test_monitor_that_tunix_does_not_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'val_loss': .* are 'eval_loss' and 'loss'"):
        TunixCheckpoint(tmp_path, monitor="val_loss")


@pytest.mark.parametrize(("rounds", "stop_at"), [(None, 1), (None, 5), (2, 5), (2, 12)])
def test_stopped_and_trained_again_ends_bit_identical(
    tmp_path: Path, rounds: int | None, stop_at: int
) -> None:
    checkpoints = TunixCheckpoint(tmp_path, every_n_train_steps=2)
    with pytest.raises(KeyboardInterrupt), checkpoints:
        train(checkpoints, rounds=rounds, stop_at=stop_at)
    steps = fp.steps(tmp_path)
    assert steps == list(range(2, stop_at // (rounds or 1) + 1, 2))
    seed = 1 if steps else 0  # what is restored is all there is of the model
    state = train(TunixCheckpoint(tmp_path, every_n_train_steps=2), seed=seed, rounds=rounds)
    assert_equal(state, train(None, rounds=rounds))
    assert fp.steps(tmp_path) == [2, 4, 6, 7]


def test_going_back_is_done_when_it_is_asked_for(tmp_path: Path) -> None:
    whole = train(TunixCheckpoint(tmp_path, every_n_train_steps=2))
    with pytest.raises(fp.CheckpointExistsError, match="discard_later"):
        train(TunixCheckpoint(tmp_path, resume={"which": 2}))
    assert fp.steps(tmp_path) == [2, 4, 6, 7]
    back = TunixCheckpoint(tmp_path, resume={"which": 2, "discard_later": True})
    assert_equal(train(back, seed=1), whole)
    assert fp.steps(tmp_path) == [2, 7]


def test_an_iterator_of_grain_goes_on_with_the_model(tmp_path: Path) -> None:
    """Grain comes with tunix."""
    import grain

    def batches() -> Any:
        return iter(grain.MapDataset.range(100).shuffle(seed=3).repeat().to_iter_dataset())

    data = batches()
    with checkpointing(tmp_path, every_n_train_steps=2, extras={"data": data}) as ckpt:
        for _ in range(5):
            ckpt.step({"w": jnp.float32(next(data))})
    want = [next(data) for _ in range(3)]
    again = batches()
    with checkpointing(tmp_path, extras={"data": again}) as ckpt:
        ckpt.restore({"w": jnp.float32(0)})
        assert [next(again) for _ in range(3)] == want


def test_each_step_holds_the_state_of_that_step(tmp_path: Path) -> None:
    """Though tunix reports a step's end only when the next one has run."""
    train(TunixCheckpoint(tmp_path, every_n_train_steps=1))
    counts = [int(fp.load(tmp_path / str(step))["opt_state"]["step"]) for step in range(1, 8)]
    assert counts == list(range(1, STEPS + 1))
