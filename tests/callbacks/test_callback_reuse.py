"""`reuse_unchanged=True`: what is frozen is written once a run, and every checkpoint is whole."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from stub_trainer import Loop

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = np.random.default_rng(0).standard_normal((6, 200, 100), np.float32)  # 80 kB a layer
ROW_BYTES = KERNEL[0].nbytes


def lora_state(step: int) -> dict[str, Any]:
    """Each layer's base never changes, what adapts it does; as new arrays each time."""
    layers = {
        str(i): {"base": jnp.asarray(KERNEL[i]), "lora": jnp.full((20, 10), step)} for i in range(6)
    }
    return {"params": {"layers": layers}, "opt_state": jnp.full((200, 100), step), "step": step}


def stacked_state(step: int) -> dict[str, Any]:
    layers = {"base": jnp.asarray(KERNEL), "lora": jnp.full((6, 20, 10), step)}
    return {"params": {"layers": layers}, "step": step}


def saving(directory: Path, state: Any = lora_state, **how: Any) -> PartialCheckpointCallback:
    options = fp.SaveOptions(durable=False)
    return PartialCheckpointCallback(
        directory,
        every_n_train_steps=1,
        state_fn=lambda trainer, _: state(trainer.global_step),
        **{"options": options, "reuse_unchanged": True, **how},
    )


def inodes(path: Path) -> set[int]:
    return {file.stat().st_ino for file in path.glob("state/part.*/data*")}


def assert_whole(directory: Path, step: int, state: Any = lora_state) -> None:
    path = directory / str(step)
    report = fp.verify(path)
    assert report.ok, report.bad
    trees.assert_same(fp.load(path, target=state(step)), state(step))


@pytest.mark.parametrize("reuses", [False, True])
def test_what_is_frozen_is_written_once_and_only_if_asked_for(
    tmp_path: Path, *, reuses: bool
) -> None:
    asked = {"reuse_unchanged": True} if reuses else {}
    callback = PartialCheckpointCallback(
        tmp_path,
        every_n_train_steps=1,
        state_fn=lambda trainer, _: lora_state(trainer.global_step),
        **asked,  # type: ignore[arg-type]
    )
    Loop(callback, batches=3).fit()
    assert [report.reused_bytes for report in callback.reports] == [
        0,
        *[KERNEL.nbytes * reuses] * 2,
    ]
    assert bool(inodes(tmp_path / "3") & inodes(tmp_path / "1")) is reuses
    for step in (1, 2, 3):
        assert_whole(tmp_path, step)


def test_retention_removes_checkpoints_whose_files_the_newer_ones_share(tmp_path: Path) -> None:
    callback = saving(tmp_path, keep_last=1)
    Loop(callback, epochs=2, batches=3).fit()
    assert fp.steps(tmp_path) == [6]
    assert callback.reports[-1].reused_bytes == KERNEL.nbytes
    assert_whole(tmp_path, 6)


def test_next_run_goes_on_sharing_with_the_newest_checkpoint_of_the_last(tmp_path: Path) -> None:
    Loop(saving(tmp_path), batches=2).fit()
    callback = saving(tmp_path)
    Loop(callback, epochs=2, batches=2).resume(lora_state(2), 2).fit()
    assert [report.reused_bytes for report in callback.reports] == [KERNEL.nbytes] * 2
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    assert_whole(tmp_path, 4)


def test_rows_of_frozen_stacked_leaves_are_shared_one_by_one(tmp_path: Path) -> None:
    callback = saving(tmp_path, stacked_state, stacked={"params.layers": 0}, keep_last=1)
    Loop(callback, batches=3).fit()
    last = callback.reports[-1]
    assert {last.saves[f"params.layers.{i}"].reused_bytes for i in range(6)} == {ROW_BYTES}
    assert_whole(tmp_path, 3, stacked_state)


def test_streamed_layers_are_shared_and_a_layer_that_thaws_is_written(tmp_path: Path) -> None:
    base = jnp.asarray(KERNEL[0])

    def stream(trainer: Any) -> None:
        thawed = base + int(trainer.global_step == 2)  # in step 3: the trainer counts later
        callback.on_layer_ready(trainer, "frozen", {"w": jnp.copy(base)})
        callback.on_layer_ready(trainer, "thaws", {"w": thawed})

    callback = saving(tmp_path, lambda step: {"step": step})
    Loop(callback, batches=4, at={"ready": stream}).fit()
    shares = [
        {group: save.reused_bytes > 0 for group, save in report.saves.items()}
        for report in callback.reports
    ]
    assert [share["params.frozen"] for share in shares] == [False, True, True, True]
    assert [share["params.thaws"] for share in shares] == [False, True, False, False]
    loaded = fp.load(tmp_path / "3")
    np.testing.assert_array_equal(loaded["params"]["thaws"]["w"], KERNEL[0] + 1)


def test_metrics_and_several_callbacks_change_nothing_of_that(tmp_path: Path) -> None:
    """Metrics are stored in a part of their own, without a leaf."""
    hook = FinalizeHook()
    arrays = {"a": jnp.asarray(KERNEL[0]), "b": jnp.asarray(KERNEL)}
    params = saving(tmp_path, lambda _: {"params": arrays}, finalizer=hook)
    rest = saving(tmp_path, lambda step: {"step": step}, finalizer=hook, reuse_unchanged=False)
    Loop(params, rest, batches=3, metrics=lambda step: {"loss": 1.0 / step}).fit()
    total = sum(array.nbytes for array in arrays.values())
    assert [report.reused_bytes for report in hook.reports] == [0, total, total]
    assert fp.metadata(tmp_path / "3").custom_metadata["metrics"] == {"loss": 1 / 3}
    assert inodes(tmp_path / "3") <= inodes(tmp_path / "1")
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    assert fp.verify(tmp_path / "3").ok
    np.testing.assert_array_equal(fp.load(tmp_path / "3")["params"]["b"], KERNEL)


def test_state_that_passes_through_jit_is_known_by_its_content(tmp_path: Path) -> None:
    step_function = jax.jit(lambda state: {**state, "n": state["n"] + 1}, donate_argnums=0)
    states = [{"frozen": jnp.asarray(KERNEL), "n": jnp.int32(0)}]

    def state(_: int) -> Any:
        states[0] = step_function(states[0])
        return states[0]

    callback = saving(tmp_path, state)
    Loop(callback, batches=3).fit()
    assert [r.reused_bytes for r in callback.reports] == [0, KERNEL.nbytes, KERNEL.nbytes]
