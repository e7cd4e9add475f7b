"""The callback knows an NNX module with its optimizer, and a Flax `TrainState`, by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from stub_trainer import restored

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _as_optax_needs_it() -> Iterator[None]:
    """Optax raises a Python float to the power of its int32 count."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


ADAM = optax.adamw(1e-2)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norm(self.linear(x)))


class Model(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Linear(2, 4, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


@nnx.jit
def train(model: Model, optimizer: nnx.Optimizer[Model]) -> None:
    def loss(model: Model) -> jax.Array:
        return jnp.square(model(jnp.ones((3, 2)))).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def model_and_optimizer(seed: int) -> tuple[Model, nnx.Optimizer[Model]]:
    model = Model(seed)
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)


def trainer_with(**attributes: Any) -> Any:
    return SimpleNamespace(
        global_step=0, current_epoch=0, callback_metrics={}, is_last_batch=True, **attributes
    )


def save_one_step(callback: PartialCheckpointCallback, trainer: Any, module: Any) -> None:
    """A step in which `callback` is handed the layers that `trainer.streamed` names."""
    callback.on_fit_start(trainer, module)
    for name, tree in getattr(trainer, "streamed", {}).items():
        callback.on_layer_ready(trainer, name, tree)
    trainer.global_step += 1
    callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_epoch_end(trainer, module)
    callback.on_train_end(trainer, module)


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)  # noqa: PLW2901
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("place", ["module", "state"])
def test_nnx_module_and_optimizer_are_saved_and_restored_in_place(
    tmp_path: Path, place: str
) -> None:
    model, optimizer = model_and_optimizer(0)
    train(model, optimizer)
    callback = PartialCheckpointCallback(tmp_path)
    held = {"optimizer": optimizer} | ({"state": model} if place == "state" else {})
    save_one_step(callback, trainer_with(**held), model if place == "module" else None)
    assert set(callback.reports[0].groups) > {"params.embed", "params.blocks.0", "params.blocks.1"}

    other, other_optimizer = model_and_optimizer(1)
    bias = other.embed.bias
    state, step = restored(callback, {"params": other, "opt_state": other_optimizer})
    assert step == 1
    assert state["params"] is other
    assert other.embed.bias is bias
    assert_equal(nnx.state(other), nnx.state(model))
    assert_equal(nnx.state(other_optimizer), nnx.state(optimizer))
    train(model, optimizer)
    train(other, other_optimizer)
    assert_equal(nnx.state(other), nnx.state(model))


def test_nnx_module_alone_is_restored_from_params(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(0)
    callback = PartialCheckpointCallback(tmp_path)
    save_one_step(callback, trainer_with(optimizer=optimizer), model)
    other = Model(1)
    assert restored(callback, other, partial=True)[0] is other
    assert_equal(nnx.state(other), nnx.state(model))


def test_nnx_states_and_variables_are_restored_in_place(tmp_path: Path) -> None:
    model = Model(0)
    callback = PartialCheckpointCallback(tmp_path)
    save_one_step(callback, trainer_with(), model)
    other = Model(1)
    blocks = nnx.state(other.blocks)
    target = {"params": {"embed": {"kernel": other.embed.kernel}, "blocks": blocks}}
    callback.restore(target, partial=True)
    # By index: `get_value` is of newer versions of Flax, and `value` of older ones.
    assert_equal(other.embed.kernel[...], model.embed.kernel[...])
    assert_equal(nnx.to_pure_dict(blocks), nnx.to_pure_dict(nnx.state(model.blocks)))


@pytest.mark.parametrize("streamed_as", ["module", "state", "pure"])
def test_streamed_nnx_layers_are_not_taken_twice(tmp_path: Path, streamed_as: str) -> None:
    model = Model(0)
    take = {
        "module": lambda block: block,
        "state": nnx.state,
        "pure": lambda block: nnx.to_pure_dict(nnx.state(block)),
    }[streamed_as]
    trainer = trainer_with(
        streamed={f"blocks.{number}": take(block) for number, block in enumerate(model.blocks)}
    )
    callback = PartialCheckpointCallback(tmp_path)
    save_one_step(callback, trainer, model)
    (report,) = callback.reports
    assert report.groups == ("params.blocks.0", "params.blocks.1", "params.embed")
    other = Model(1)
    assert callback.restore(other) is not None
    assert_equal(nnx.state(other), nnx.state(model))


def test_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path)
    save_one_step(callback, trainer_with(), Model(0))
    wider = nnx.Linear(7, 7, rngs=nnx.Rngs(2))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(wider)))
    with pytest.raises(fp.TargetMismatchError):
        callback.restore({"params": {"embed": wider}})
    assert_equal(nnx.to_pure_dict(nnx.state(wider)), before)


@pytest.mark.parametrize("place", ["module", "state"])
def test_train_state_is_saved_with_its_own_fields(tmp_path: Path, place: str) -> None:
    def new(value: float) -> TrainState:
        params = {"Dense_0": {"kernel": jnp.full((3, 2), value), "bias": jnp.full((2,), value)}}
        return TrainState.create(apply_fn=print, params=params, tx=optax.adam(0.1))

    state = new(1.0).apply_gradients(grads=new(0.5).params)
    callback = PartialCheckpointCallback(tmp_path)
    held = {"state": state} if place == "state" else {}
    save_one_step(callback, trainer_with(**held), state if place == "module" else None)
    groups = "step params.Dense_0 opt_state.0 opt_state.Dense_0 opt_state.1"
    assert " ".join(callback.reports[0].groups) == groups
    found, _ = restored(callback, new(0.0))
    assert isinstance(found, TrainState)
    assert found.apply_fn is print
    assert found.step == 1
    assert_equal((found.params, found.opt_state), (state.params, state.opt_state))


class Adapted(nnx.Module):
    """Two layers whose kernels are frozen: their adapters are what is trained."""

    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.LoRALinear(150, 150, lora_rank=2, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


@nnx.jit
def tune(model: Adapted, optimizer: nnx.Optimizer[Adapted]) -> None:
    def loss(model: Adapted) -> jax.Array:
        return jnp.square(model(jnp.ones((3, 150)))).mean()

    gradient = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
    optimizer.update(model, gradient(model))


def test_frozen_kernels_beside_their_adapters_are_written_once(tmp_path: Path) -> None:
    model = Adapted(seed=0)
    kernel_bytes = sum(layer.kernel[...].nbytes for layer in model.layers)
    trainer = trainer_with(optimizer=nnx.Optimizer(model, ADAM, wrt=nnx.LoRAParam))
    callback = PartialCheckpointCallback(
        tmp_path, every_n_train_steps=1, reuse_unchanged=True, keep_last=1
    )
    callback.on_fit_start(trainer, model)
    for trainer.global_step in (1, 2, 3):
        tune(model, trainer.optimizer)
        callback.on_train_batch_end(trainer, model, None, None, 0)
    callback.on_train_end(trainer, model)
    assert [report.reused_bytes for report in callback.reports] == [0, kernel_bytes, kernel_bytes]
    other = Adapted(seed=1)
    optimizer = nnx.Optimizer(other, ADAM, wrt=nnx.LoRAParam)
    assert callback.restore({"params": other, "opt_state": optimizer}) is not None
    x = jnp.ones((1, 150))
    np.testing.assert_array_equal(other(x), model(x))
