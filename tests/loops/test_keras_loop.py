"""Keras's own `fit`, on its JAX backend, stops and goes on with the results of one that did not."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from small_model import assert_equal

import flax_partial as fp

keras = pytest.importorskip("keras", reason="pip install 'flax-partial[keras]'")

from flax_partial.callbacks._schedule import direction  # noqa: E402
from flax_partial.callbacks.keras import KerasCheckpoint  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

BATCHES, EPOCHS = 4, 3
INPUTS = np.linspace(-1, 1, 2 * BATCHES * 3, dtype=np.float32).reshape(2 * BATCHES, 3)
TARGETS = np.sin(INPUTS.sum(axis=1, keepdims=True))


def new_model() -> Any:
    keras.backend.clear_session()  # names count from the start, as in a process of its own
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(4, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    return model


class Stop(keras.callbacks.Callback):  # type: ignore[misc]
    """Raises after so many batches."""

    def __init__(self, after: int, stop: BaseException) -> None:
        super().__init__()
        self.left, self.stop = after, stop

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            raise self.stop


def fit(model: Any, *callbacks: Any, epochs: int = EPOCHS, **options: Any) -> Any:
    return model.fit(
        INPUTS, TARGETS, batch_size=2, epochs=epochs, shuffle=False, verbose=0,
        callbacks=list(callbacks), validation_data=(INPUTS, TARGETS), **options,
    )  # fmt: skip


def variables(model: Any) -> Any:
    return jax.tree.map(
        np.asarray, {k: v for k, v in model.get_state_tree().items() if k != "metrics_variables"}
    )


@functools.cache
def uninterrupted() -> Any:
    model = new_model()
    fit(model)
    return variables(model)


def saved(directory: Path) -> Any:
    newest = fp.latest(directory)
    assert newest is not None
    tree = fp.load(newest)
    assert tree.pop("epochs_done") == EPOCHS
    return tree


def test_epochs_are_saved_with_the_metrics_of_validation(tmp_path: Path) -> None:
    callback = KerasCheckpoint(tmp_path, monitor="val_loss", save_top_k=1, keep_last=3)
    model = new_model()
    fit(model, callback)
    assert fp.steps(tmp_path) == [4, 8, 12]
    for step in (4, 12):
        metrics = fp.metadata(tmp_path / str(step)).custom_metadata["metrics"]
        assert set(metrics) == {"loss", "val_loss"}
    assert callback.callback.restore(which="best") is not None
    assert_equal(saved(tmp_path), variables(model))
    assert_equal(saved(tmp_path), uninterrupted())


@pytest.mark.parametrize(
    ("after", "stop"), [(2, ValueError("wrong")), (6, KeyboardInterrupt())], ids=repr
)
def test_stopped_and_fitted_again_ends_bit_identical(
    tmp_path: Path, after: int, stop: BaseException
) -> None:
    callback = KerasCheckpoint(tmp_path)
    with pytest.raises(type(stop)), callback:
        fit(new_model(), callback, Stop(after, stop))
    assert fp.steps(tmp_path) == [4, 8][: after // BATCHES]
    model = new_model()
    history = fit(model, KerasCheckpoint(tmp_path))
    assert history.epoch == list(range(after // BATCHES, EPOCHS))
    assert_equal(variables(model), uninterrupted())
    assert_equal(saved(tmp_path), uninterrupted())


def test_works_beside_kerass_own_orbax_checkpoint(tmp_path: Path) -> None:
    theirs = keras.callbacks.OrbaxCheckpoint(str(tmp_path / "theirs"), max_to_keep=None)
    model = new_model()
    fit(model, theirs, KerasCheckpoint(tmp_path / "ours"))
    assert fp.steps(tmp_path / "ours") == [4, 8, 12]
    assert len([path for path in (tmp_path / "theirs").iterdir() if path.name.isdecimal()]) == 3
    assert_equal(saved(tmp_path / "ours"), uninterrupted())


def test_a_checkpoint_within_an_epoch_restarts_that_epoch(tmp_path: Path) -> None:
    callback = KerasCheckpoint(tmp_path, every_n_train_steps=3)
    with pytest.raises(ValueError, match="wrong"), callback:
        fit(new_model(), callback, Stop(7, ValueError("wrong")))
    assert fp.steps(tmp_path) == [3, 4, 6]
    model = new_model()
    assert fit(model, KerasCheckpoint(tmp_path)).epoch == [1, 2]
    assert int(model.optimizer.iterations) == 6 + 2 * BATCHES


def test_the_next_fit_of_a_model_that_was_resumed_trains_as_it_is_told(tmp_path: Path) -> None:
    fit(new_model(), KerasCheckpoint(tmp_path), epochs=2)
    model = new_model()
    assert fit(model, KerasCheckpoint(tmp_path)).epoch == [2]
    assert fit(model, epochs=2).epoch == [0, 1]
    model = new_model()
    checkpoints = KerasCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="wrong"), checkpoints:
        fit(model, checkpoints, Stop(1, ValueError("wrong")), epochs=4)
    assert fit(model, epochs=2).epoch == [0, 1]


def test_script_of_several_fits_repeats_no_epoch_when_it_is_started_again(tmp_path: Path) -> None:
    def script(*lengths: int, after: int = 10**9) -> list[list[int]]:
        checkpoints, model = KerasCheckpoint(tmp_path), new_model()
        stop = Stop(after, ValueError("wrong"))
        with contextlib.suppress(ValueError), checkpoints:
            return [fit(model, checkpoints, stop, epochs=one).epoch for one in lengths]
        return []

    script(2, 3, after=14)  # in the second epoch of the second fit
    assert fp.steps(tmp_path) == [4, 8, 12]
    assert script(2, 3) == [[], [1, 2]]
    assert script(2, 3, 1) == [[], [], [0]]
    assert fp.steps(tmp_path) == [4, 8, 12, 16, 20, 24]


def test_fits_with_a_callback_each_count_on_by_the_model(tmp_path: Path) -> None:
    def script() -> list[Any]:
        model = new_model()
        return [fit(model, KerasCheckpoint(tmp_path), epochs=2).epoch for _ in range(2)]

    assert script() == [[0, 1], [0, 1]]
    assert script() == [[], []]
    assert fp.steps(tmp_path) == [4, 8, 12, 16]


@pytest.mark.parametrize("is_new", [False, True], ids=["the same callback", "another"])
def test_fit_of_a_model_whose_last_one_failed_goes_on_as_in_a_new_process(
    tmp_path: Path, *, is_new: bool
) -> None:
    model, checkpoints = new_model(), KerasCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="wrong"):
        fit(model, checkpoints, Stop(6, ValueError("wrong")))
    again = KerasCheckpoint(tmp_path) if is_new else checkpoints
    assert fit(model, again).epoch == [1, 2]
    assert_equal(variables(model), uninterrupted())
    assert fit(model, again, epochs=1).epoch == [0]


def test_going_back_is_done_once_and_when_it_is_asked_for(tmp_path: Path) -> None:
    fit(new_model(), KerasCheckpoint(tmp_path))
    with pytest.raises(fp.CheckpointExistsError, match="discard_later") as told:
        fit(new_model(), KerasCheckpoint(tmp_path, resume={"which": 4}))
    assert "resume={" in "".join(told.value.__notes__)
    assert fp.steps(tmp_path) == [4, 8, 12]
    checkpoints = KerasCheckpoint(tmp_path, resume={"which": 4, "discard_later": True})
    model = new_model()
    assert fit(model, checkpoints).epoch == [1, 2]
    assert_equal(variables(model), uninterrupted())
    assert fp.steps(tmp_path) == [4, 8, 12]
    assert fit(new_model(), checkpoints).epoch == []


def test_another_model_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    model = new_model()
    fit(model, KerasCheckpoint(tmp_path), epochs=1)
    keras.backend.clear_session()
    smaller = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    smaller.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    with pytest.raises(fp.TargetMismatchError, match="is not in the target"):
        fit(smaller, KerasCheckpoint(tmp_path))
    resume: Any = {"partial": True, "keep_missing": True}
    assert fit(smaller, KerasCheckpoint(tmp_path, resume=resume)).epoch == [1, 2]


@pytest.mark.parametrize(("at_once", "steps"), [(2, [2, 4]), (3, [4])])
def test_steps_executed_several_at_once_are_counted(
    tmp_path: Path, at_once: int, steps: list[int]
) -> None:
    model = new_model()
    model.compile(optimizer="sgd", loss="mse", steps_per_execution=at_once)
    fit(model, KerasCheckpoint(tmp_path, every_n_train_steps=2), epochs=1)
    assert fp.steps(tmp_path) == steps
    assert int(model.optimizer.iterations) == BATCHES
    assert fit(model, KerasCheckpoint(tmp_path), epochs=1).epoch == [0]
    assert int(model.optimizer.iterations) == 2 * BATCHES


@pytest.mark.parametrize(
    ("monitor", "best"), [("val_accuracy", 2), ("val_loss", 1), ("loss", 1)], ids=str
)
def test_the_best_is_known_by_the_name_of_the_metric(
    tmp_path: Path, monitor: str, best: int
) -> None:
    for step, score in ((1, 0.5), (2, 0.75)):
        fp.save(tmp_path / str(step), {"w": 1}, custom_metadata={"metrics": {monitor: score}})
        fp.finalize(tmp_path / str(step))
    callback = KerasCheckpoint(tmp_path, monitor=monitor).callback
    assert callback.best_model_path == str(tmp_path / str(best))
    with pytest.raises(ValueError, match="mode='auto' cannot tell"):
        KerasCheckpoint(tmp_path, monitor="val_speed")


@pytest.mark.parametrize(
    ("monitor", "is_told"),
    [("val_speed", True), ("val_los", True), ("val_loss", False), ("learning_rate", False)],
)
def test_monitor_that_no_validation_sets_is_told_after_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monitor: str, *, is_told: bool
) -> None:
    told = []

    class Listen(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
            told.append("After the first step the monitor" in caplog.text)

    fit(new_model(), KerasCheckpoint(tmp_path, monitor=monitor, mode="min"), Listen(), epochs=1)
    assert told[0] == is_told


def test_of_steps_of_ones_own_no_metrics_are_expected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(keras.Sequential):  # type: ignore[misc]
        def test_step(self, *arguments: Any) -> Any:
            logs, state = super().test_step(*arguments)
            return logs | {"recall": logs["loss"]}, state

    model = Own([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    checkpoints = KerasCheckpoint(tmp_path, monitor="val_recall")
    fit(model, checkpoints, epochs=1)
    assert "the monitor" not in caplog.text
    assert checkpoints.callback.best_model_score is not None


WITH_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "PrecisionAtRecall": (0.5,),
    "RecallAtPrecision": (0.5,),
    "SensitivityAtSpecificity": (0.5,),
    "SpecificityAtSensitivity": (0.5,),
    "IoU": (2, [0]),
    "OneHotIoU": (2, [0]),
    "MeanIoU": (2,),
    "OneHotMeanIoU": (2,),
    "MeanRelativeError": ([1.0],),
}


def test_metrics_of_keras_are_better_large_or_small_as_keras_knows() -> None:
    own = ("Metric", "MeanMetricWrapper")
    kinds = {name: one for name, one in vars(keras.metrics).items() if isinstance(one, type)}
    metrics = [one(*WITH_ARGUMENTS.get(name, ())) for name, one in kinds.items() if name not in own]
    known = {one.name: one._direction for one in metrics if hasattr(one, "_direction")}  # noqa: SLF001
    assert len(known) > 20
    for name, way in known.items():
        assert direction(f"val_{name}", "auto") == {"up": "max", "down": "min"}[way], name


def test_step_saved_within_an_epoch_has_no_score_of_the_epoch_before(tmp_path: Path) -> None:
    fit(new_model(), KerasCheckpoint(tmp_path, every_n_train_steps=2, monitor="val_loss"))
    scores = {
        step: fp.metadata(tmp_path / str(step)).custom_metadata.get("metrics", {})
        for step in fp.steps(tmp_path)
    }
    assert [step for step, metrics in scores.items() if "val_loss" in metrics] == [4, 8, 12]
    assert [*scores] == [2, 4, 6, 8, 10, 12]


def test_model_that_is_built_again_is_told_what_keras_did_to_its_names(tmp_path: Path) -> None:
    fit(new_model(), KerasCheckpoint(tmp_path), epochs=1)
    again = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    again.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    with pytest.raises(fp.TargetMismatchError, match=r"keras\.utils\.clear_session"):
        fit(again, KerasCheckpoint(tmp_path))


def test_another_backend_is_refused(tmp_path: Path) -> None:
    code = "from flax_partial.callbacks.keras import KerasCheckpoint as K; K('run')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert "KERAS_BACKEND=jax before keras is imported" in done.stderr
