"""What would fail when the first checkpoint is due is told before, with what was probably meant."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import pytest
from stub_trainer import begun, end_step

import flax_partial as fp
from flax_partial.callbacks import BestN, FinalizeHook, PartialCheckpointCallback, checkpointing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SELDOM: dict[str, Any] = {"every_n_train_steps": 1000, "every_n_epochs": None}
LAYERS = {"layers": {"w": jnp.ones((4, 3))}, "head": {"w": jnp.ones(3)}}
STATE = {"params": LAYERS, "opt_state": {"mu": LAYERS}}

AT_START: dict[str, tuple[Mapping[str, Any], str]] = {
    "group_by": ({"group_by": "layers"}, "group_by is 'layers'; it must be a Callable"),
    "state_fn": ({"state_fn": {"w": 1}}, r"state_fn is {.*}; it must be a Callable"),
    "on_metrics": ({"on_metrics": 3}, "on_metrics is 3; it must be a Callable"),
    "stacked": ({"stacked": "params.layers"}, "stacked is 'params.layers'; it must be a Mapping"),
    "axis": ({"stacked": {"params.layers": "0"}}, "to the number of an axis"),
    "extras": ({"extras": [1]}, r"extras is \[1\]; it must be a Mapping"),
    "an extra": ({"extras": {"data": 3}}, r"extras\['data'\] is int, which has no methods"),
    "monitor": ({"monitor": len}, "monitor is .* must be a str"),
    "options": ({"options": {"durable": False}}, "options is .* must be a SaveOptions"),
    "finalizer": ({"finalizer": FinalizeHook}, "finalizer is .* must be a FinalizeHook"),
    "keep": ({"keep": BestN}, "which is no policy"),
    "count": ({"keep_last": 2.5}, r"keep_last is 2\.5; it must be a whole number"),
    "period": ({"every_n_epochs": "3"}, "every_n_epochs is '3'; it must be a whole number"),
    "interval": ({"train_time_interval": 30}, r"must be a datetime\.timedelta"),
}


@pytest.mark.parametrize("case", AT_START)
def test_option_of_a_wrong_kind_is_refused_at_the_start(tmp_path: Path, case: str) -> None:
    options, message = AT_START[case]
    with pytest.raises(TypeError, match=message):
        PartialCheckpointCallback(tmp_path, **options)


AFTER_ONE_STEP: dict[str, tuple[Mapping[str, Any], type[Exception], str]] = {
    "stacked, a letter": (
        {"stacked": {"params.layer": 0}},
        ValueError,
        r"names 'params\.layer', and .* It has such as 'params\.layers'",
    ),
    "stacked, the root": ({"stacked": {"layers": 0}}, ValueError, r"'params\.layers'"),
    "no group": (
        {"group_by": lambda _: None},
        TypeError,
        r"group_by returned None for leaf 'opt_state\.mu",
    ),
    "group_by that raises": ({"group_by": lambda path: path[9]}, IndexError, "out of range"),
}


@pytest.mark.parametrize("case", AFTER_ONE_STEP)
def test_option_that_does_not_fit_the_state_is_told_after_the_first_step(
    tmp_path: Path, case: str
) -> None:
    options, kind, message = AFTER_ONE_STEP[case]
    with checkpointing(tmp_path, **SELDOM, **options) as ckpt:
        with pytest.raises(kind, match=message) as caught:
            ckpt.step(STATE)
        assert "No checkpoint is due yet" in caught.value.__notes__[0]
        assert ckpt.steps_done == 0


@pytest.mark.parametrize(
    ("stacked", "told"), [("params.layers", ""), ("params.layer", "'params.layers'")]
)
def test_what_is_streamed_counts_for_the_first_step(
    tmp_path: Path, stacked: str, told: str
) -> None:
    callback = PartialCheckpointCallback(
        tmp_path, stacked={stacked: 0}, state_fn=lambda *_: {"opt_state": 1}, **SELDOM
    )
    trainer = begun(callback)
    callback.on_layer_ready(trainer, "layers", LAYERS["layers"])
    if told:
        with pytest.raises(ValueError, match=told):
            end_step(callback, trainer, 1)
    else:
        end_step(callback, trainer, 1)


# A monitor, the trainer's metrics after its first step, and the one that was meant.
MONITORS: dict[str, tuple[str, list[str], str | None]] = {
    "a letter too few": ("los", ["loss"], "loss"),
    "two letters turned round": ("val_lsos", ["val_loss"], "val_loss"),
    "another separator": ("val/loss", ["val_loss"], "val_loss"),
    "none": ("evalacc", ["eval_acc", "loss"], "eval_acc"),
    "capitals": ("Loss", ["loss"], "loss"),
    "short for it": ("val_acc", ["val_accuracy"], "val_accuracy"),
    "comes after a validation": ("val_loss", ["loss"], None),
    "comes with the epoch": ("train_loss_epoch", ["train_loss_step", "train_loss"], None),
    "there is none yet": ("loss", [], None),
    "as it is": ("loss", ["loss"], None),
}


@pytest.mark.parametrize("by_policy", [False, True], ids=["monitor", "policy"])
@pytest.mark.parametrize("case", MONITORS)
def test_misspelt_monitor_is_told_after_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, *, by_policy: bool
) -> None:
    monitor, names, meant = MONITORS[case]
    options: dict[str, Any] = {"keep": BestN(2, monitor, "min")} if by_policy else {}
    caplog.set_level(logging.WARNING, "flax_partial")
    with checkpointing(tmp_path, **SELDOM, **(options or {"monitor": monitor})) as ckpt:
        for _ in range(3):
            ckpt.step(STATE, metrics=dict.fromkeys(names, 1.0))
        told = "" if meant is None else f"did you mean {meant!r}?"
        assert caplog.text.count("After the first step") == bool(meant)
        assert told in caplog.text


def test_what_is_told_early_is_logged_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"stacked": {"params.layer": 0}, "on_save_error": "warn"}
    with checkpointing(tmp_path, **SELDOM, **options) as ckpt:
        for _ in range(3):
            ckpt.step(STATE)
    assert caplog.text.count("The first checkpoint") == 1
    assert fp.steps(tmp_path) == []
