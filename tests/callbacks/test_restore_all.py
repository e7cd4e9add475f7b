"""Restoring gives back all that was saved, or says what it did not."""

from __future__ import annotations

import logging
import types
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback, checkpointing

if TYPE_CHECKING:
    from pathlib import Path


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def net(seed: int) -> Net:
    return Net(nnx.Rngs(seed))


def kernel(model: Net) -> np.ndarray:
    return np.asarray(model.hidden.kernel[...])


def optimizer_of(model: Net, moment: float) -> Any:
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    moments = jax.tree.map(lambda leaf: jnp.full_like(leaf, moment), nnx.state(optimizer))
    nnx.update(optimizer, moments)
    return optimizer


def trainer_with(**held: Any) -> Any:
    return types.SimpleNamespace(
        global_step=0, current_epoch=0, callback_metrics={}, is_last_batch=True, **held
    )


def save_step(callback: PartialCheckpointCallback, trainer: Any, module: Any) -> None:
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_epoch_end(trainer, module)
    callback.on_train_end(trainer, module)


def test_model_and_optimizer_of_a_trainer_come_back_in_place(tmp_path: Path) -> None:
    saved = net(0)
    save_step(
        PartialCheckpointCallback(tmp_path), trainer_with(optimizer=optimizer_of(saved, 3.0)), saved
    )
    model = net(1)
    trainer = trainer_with(optimizer=optimizer_of(model, 0.0))
    restored = PartialCheckpointCallback(tmp_path).restore(trainer, model)
    assert restored is not None
    assert restored[1] == trainer.global_step == trainer.current_epoch == 1
    assert (kernel(model) == kernel(saved)).all()
    moments = jax.tree.leaves(nnx.to_pure_dict(nnx.state(trainer.optimizer)))
    assert all((leaf == jnp.asarray(3.0, leaf.dtype)).all() for leaf in moments)


@pytest.mark.parametrize("kind", ["dict", "TrainState"])
def test_a_trainers_own_state_is_replaced(tmp_path: Path, kind: str) -> None:
    def state(value: float) -> Any:
        params = {"w": jnp.full(2, value)}
        if kind == "dict":
            return {"params": params}
        return TrainState.create(apply_fn=len, params=params, tx=optax.adam(value + 1))

    save_step(PartialCheckpointCallback(tmp_path), trainer_with(state=state(1.0)), None)
    trainer = trainer_with(state=state(0.0))
    tx = getattr(trainer.state, "tx", None)
    assert PartialCheckpointCallback(tmp_path).restore(trainer) is not None
    params = trainer.state["params"] if kind == "dict" else trainer.state.params
    assert params["w"][0] == 1
    assert getattr(trainer.state, "tx", None) is tx


def test_counters_that_cannot_be_set_are_left_to_the_trainer(tmp_path: Path) -> None:
    class Trainer:
        global_step = property(lambda _: 7)
        current_epoch, callback_metrics, is_last_batch = 0, {}, True

        def __init__(self) -> None:
            self.state = {"w": jnp.zeros(2)}

    save_step(PartialCheckpointCallback(tmp_path), trainer_with(state={"w": jnp.ones(2)}), None)
    trainer = Trainer()
    PartialCheckpointCallback(tmp_path).restore(trainer)
    assert (trainer.global_step, trainer.state["w"][0]) == (7, 1)


def test_a_trainer_without_a_state_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Found no state to save in SimpleNamespace.*state_fn="):
        PartialCheckpointCallback(tmp_path).restore(trainer_with())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        pytest.param(lambda model: model, "opt_state (10 leaves).", id="module"),
        pytest.param(
            lambda model: {"params": {"hidden": model.hidden}},
            "opt_state (10 leaves), params.norm (4 leaves).",
            id="subtree",
        ),
        pytest.param(
            lambda _: {"params": {"hidden": {"bias": jnp.zeros(2)}}},
            "params.hidden.kernel (1 leaf)",
            id="leaf",
        ),
        pytest.param(
            lambda model: {"params": model, "opt_state": optimizer_of(model, 0.0)}, None, id="all"
        ),
    ],
)
def test_what_of_a_checkpoint_is_not_restored_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, target: Any, said: str | None
) -> None:
    caplog.set_level(logging.INFO)
    model = net(0)
    state = {"params": model, "opt_state": optimizer_of(model, 1.0)}
    with checkpointing(tmp_path) as ckpt:
        ckpt.step(state)
    PartialCheckpointCallback(tmp_path).restore(target(model), partial=True)
    with checkpointing(tmp_path) as ckpt:
        ckpt.restore(target(model), partial=True)
    told = [one for one in caplog.records if "Not restored of" in one.getMessage()]
    assert [one.levelno for one in told] == ([logging.INFO, logging.WARNING] if said else [])
    assert all(
        f"{tmp_path / '1'}: " in one.getMessage() and (said or "") in one.getMessage()
        for one in told
    )


def test_a_model_without_its_optimizer_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = net(0)
    said = "is an NNX model without its optimizer"
    with checkpointing(tmp_path / "a", every_n_train_steps=1) as ckpt:
        ckpt.step(model)
        ckpt.step(model)
    assert caplog.text.count(said) == 1
    caplog.clear()
    for state in ({"model": model, "optimizer": optimizer_of(model, 0.0)}, {"m": model, "lr": 1.0}):
        with checkpointing(tmp_path / "b", overwrite=True) as ckpt:
            ckpt.step(state)
    with checkpointing(tmp_path / "c", every_n_train_steps=1) as ckpt:
        ckpt.optimizer_state_ready("hidden", {"mu": jnp.zeros(2)})
        ckpt.step(model)
    assert said not in caplog.text


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(lambda: net(1), id="module"),
        pytest.param(lambda: nnx.state(net(1)), id="state"),
        pytest.param(lambda: nnx.eval_shape(lambda: net(1)), id="eval_shape"),
        pytest.param(lambda: nnx.to_pure_dict(nnx.state(net(1))), id="pure dict"),
    ],
)
def test_load_takes_what_the_callback_saved_by_the_same_names(tmp_path: Path, target: Any) -> None:
    model = net(0)
    with checkpointing(tmp_path) as ckpt:
        ckpt.step({"params": model, "opt_state": optimizer_of(model, 0.0)})
    loaded = fp.load(tmp_path / "1", {"params": target()}, partial=True)["params"]
    found = (
        loaded["hidden"]["kernel"] if isinstance(loaded, dict | nnx.State) else loaded.hidden.kernel
    )
    assert (np.asarray(found) == kernel(model)).all()
    with pytest.raises(fp.TargetMismatchError, match=r"below 'params': pass {'params': target}"):
        fp.load(tmp_path / "1", target())


def test_mismatch_names_the_checkpoint_and_close_names(tmp_path: Path) -> None:
    fp.save(tmp_path / "1", {"params": {"hidden": np.zeros(2), "w": 1}})
    fp.finalize(tmp_path / "1")
    with pytest.raises(fp.TargetMismatchError) as told:
        fp.load(tmp_path / "1", {"params": {"hiden": np.zeros(2)}}, partial=True)
    first, lacking, meant = str(told.value).splitlines()
    assert first.startswith(f"{tmp_path / '1'} does not fit the target (1 leaf; keep_missing=True")
    assert lacking == "  'params.hiden' is not in the checkpoint"
    assert meant == "  The checkpoint has 'params.hidden' for 'params.hiden'."
    fp.save(tmp_path / "2", {f"layer_{i}": 1 for i in range(9)})
    fp.finalize(tmp_path / "2")
    with pytest.raises(fp.TargetMismatchError, match="'layer_2' for 'layr_2', and 6 more"):
        fp.load(tmp_path / "2", {f"layr_{i}": 1 for i in range(9)})
