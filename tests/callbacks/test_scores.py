"""A checkpoint's score is that of its own step, whenever the validation comes; or it has none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import pytest
from stub_trainer import Loop, StubTrainer, begun, end_step, fitted, new_state

import flax_partial as fp
from flax_partial.callbacks import BestN, PartialCheckpointCallback, checkpointing
from flax_partial.callbacks._metrics import StepMetrics
from flax_partial.callbacks._schedule import direction

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VALIDATIONS = {2: 0.9, 4: 0.1, 6: 0.5, 8: 0.7}
EACH_STEP: dict[str, Any] = {"every_n_epochs": None, "every_n_train_steps": 1}


def stored(directory: Path) -> dict[int, dict[str, float]]:
    return {
        step: fp.metadata(directory / str(step)).custom_metadata.get("metrics", {})
        for step in fp.steps(directory)
    }


def validating(number: Callable[[float], Any]) -> Callable[[StubTrainer], None]:
    """A validation every second step, into a mapping that is never replaced, as Lightning's."""

    def validate(trainer: StubTrainer) -> None:
        if trainer.global_step in VALIDATIONS:
            trainer.callback_metrics["val_loss"] = number(VALIDATIONS[trainer.global_step])

    return validate


@pytest.mark.parametrize("number", [float, jnp.float32], ids=["float", "array"])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_end"])
def test_validation_between_two_steps_scores_the_step_before(
    tmp_path: Path, hook: str, number: Any
) -> None:
    validate = validating(number)

    class Validates:
        """Stands behind the callback in the trainer's list, and validates once a step is saved."""

        def __getattr__(self, _: str) -> Any:
            return lambda *_: None

        def on_train_batch_end(self, trainer: StubTrainer, *_: Any) -> None:
            if hook == "on_validation_end":
                validate(trainer)
                callback.on_validation_end(trainer, None)

    callback = PartialCheckpointCallback(tmp_path, monitor="val_loss", **EACH_STEP)
    at = {hook: validate} if hook == "on_train_batch_start" else {}
    Loop(callback, Validates(), batches=9, at=at).fit()
    assert [*stored(tmp_path)] == [*range(1, 10)]
    scores = {step: metrics.get("val_loss") for step, metrics in stored(tmp_path).items()}
    expected = {step: VALIDATIONS.get(step) for step in range(1, 10)}
    assert scores == pytest.approx(expected, nan_ok=True)
    assert callback.best_model_path == str(tmp_path / "4")


def test_validation_at_the_end_of_an_epoch_scores_a_step_that_was_due_by_steps(
    tmp_path: Path,
) -> None:
    keeps: Any = {"monitor": "val_loss", "keep": BestN(1, "val_loss", "min", max_unranked=0)}
    with checkpointing(tmp_path, every_n_train_steps=5, **keeps) as ckpt:
        for epoch, loss in enumerate([0.9, 0.2, 0.5]):
            for _ in range(10):  # the tenth is due by steps as well
                ckpt.step(new_state(0), metrics={"loss": 1.0})
            ckpt.end_epoch(epoch, metrics={"val_loss": loss})
    assert ckpt.callback.best_model_score == 0.2
    assert stored(tmp_path) == {20: {"loss": 1, "val_loss": 0.2}, 30: {"loss": 1, "val_loss": 0.5}}


def test_plain_loop_adds_metrics_after_the_step(tmp_path: Path) -> None:
    with checkpointing(tmp_path, monitor="val_loss", **EACH_STEP) as ckpt:
        for step in range(1, 5):
            ckpt.step(new_state(0), metrics={"loss": float(step)})
            if step % 2 == 0:
                ckpt.add_metrics({"val_loss": 1 / step})
    assert stored(tmp_path) == {
        1: {"loss": 1},
        2: {"loss": 2, "val_loss": 0.5},
        3: {"loss": 3},
        4: {"loss": 4, "val_loss": 0.25},
    }


def test_checkpoint_waits_for_its_score_and_for_nothing_else(tmp_path: Path) -> None:
    waits, scored = tmp_path / "waits", tmp_path / "scored"
    for directory, metrics in ((waits, {"loss": 1.0}), (scored, {"val_loss": 1.0})):
        callback = PartialCheckpointCallback(directory, monitor="val_loss", **EACH_STEP)
        trainer = begun(callback)
        trainer.callback_metrics = metrics
        end_step(callback, trainer, 1)
        callback._run.finalizer.wait()  # noqa: SLF001 - of what is closed; the hook's would close it
        assert fp.steps(directory) == [1] * (directory == scored)
        callback.on_train_batch_start(trainer, None, None, 1)
        callback._run.finalizer.wait()  # noqa: SLF001
        assert fp.steps(directory) == [1]
        callback.on_train_end(trainer, None)


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        pytest.param(
            {"val_los": 1.0}, "(did you mean 'val_los'?). Metrics there are: val_los.", id=""
        ),
        pytest.param({}, "so far. Metrics there are: none.", id="none at all"),
        pytest.param({"val_loss": math.nan}, "has no score: 'val_loss' is nan. Metrics", id="NaN"),
        pytest.param({"val_loss": -math.inf}, "'val_loss' is -inf. Metrics", id="infinite"),
        pytest.param({"val_loss": "high"}, "'val_loss' is high. Metrics", id="text"),
    ],
)
def test_first_checkpoint_without_a_score_says_which_metrics_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metrics: Any, says: str
) -> None:
    fitted(tmp_path, epochs=3, metrics=lambda _: dict(metrics), monitor="val_loss", save_top_k=1)
    (said,) = [record.getMessage() for record in caplog.records if "score" in record.getMessage()]
    assert says in said
    assert fp.steps(tmp_path) == [2, 4, 6]  # not ranked, and not removed for it
    with pytest.raises(ValueError, match=r"No checkpoint in .* has the metric 'val_loss'"):
        PartialCheckpointCallback(tmp_path, monitor="val_loss").restore(which="best")


def test_metric_of_an_earlier_step_is_no_score_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def validate(trainer: StubTrainer) -> None:
        trainer.callback_metrics.setdefault("val_loss", 0.5)

    fitted(
        tmp_path, batches=3, monitor="val_loss", at={"on_train_batch_start": validate}, **EACH_STEP
    )
    assert not any(stored(tmp_path).values())  # it was there before the first step
    assert "was not set in this step: its value is of an earlier one" in caplog.text


def test_misspelt_monitor_is_told_at_the_end_of_the_first_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {"val_loss": 1.0}
    fitted(tmp_path, epochs=3, every_n_epochs=3, metrics=lambda _: losses, monitor="valloss")
    said = caplog.records[1].getMessage()  # as was said after the first step
    assert said.startswith("The first epoch had no score: 'valloss'")
    assert "did you mean 'val_loss'?" in said


class Tensor:
    """As PyTorch's: Lightning hands out a new view of the same data each time."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


SAME = object()


@pytest.mark.parametrize(
    ("looks", "own"),
    [
        pytest.param([(1, {"a": 1.0}), (2, {"a": 1.0})], {"a"}, id="numbers of a new mapping"),
        pytest.param([(1, {"a": SAME}), (2, {"a": SAME})], set(), id="one object"),
        pytest.param([(1, {"a": SAME}), (2, {"a": object()})], {"a"}, id="another object"),
        pytest.param([(1, {"a": SAME}), (1, {"a": SAME})], {"a"}, id="looked at twice"),
        pytest.param([(1, {}), (2, {"a": 1}), (2, {"a": 1, "b": 1})], {"a", "b"}, id="one by one"),
        pytest.param([(1, {"a": Tensor(7)}), (2, {"a": Tensor(7)})], set(), id="the same data"),
        pytest.param([(1, {"a": Tensor(7)}), (2, {"a": Tensor(8)})], {"a"}, id="other data"),
    ],
)
def test_metrics_of_a_step_are_those_that_were_set_since_the_last(looks: Any, own: Any) -> None:
    metrics = StepMetrics()
    for step, there in looks:
        metrics.look(step, there)
    assert metrics.of(step).keys() == own
    assert metrics.of(step + 1) == {}


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [
        *(("loss", "min"), ("val_loss", "min"), ("val/perplexity", "min"), ("RMSE", "min")),
        *(("val_accuracy", "max"), ("val_acc", "max"), ("eval-F1", "max"), ("mean_iou", "max")),
        *((None, "min"), ("spaces", None), ("accuracy_loss", None)),
    ],
)
def test_mode_auto_goes_by_the_words_of_the_name(monitor: str | None, mode: str | None) -> None:
    if mode is not None:
        assert direction(monitor, "auto") == mode
        return
    with pytest.raises(ValueError, match="Pass mode='min' or mode='max'"):
        direction(monitor, "auto")
