"""What a checkpoint cost: told to the trainer's logger or a function, and in a line of the log."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from stub_trainer import Loop, StubTrainer
from test_callback import names_in

import flax_partial as fp
from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAMES = {
    "checkpoint/blocked_secs",
    "checkpoint/write_secs",
    "checkpoint/bytes",
    "checkpoint/finalize_secs",
}


class Sink:
    """Lightning's loggers, as far as they are called here; and a function."""

    def __init__(self) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert step is not None
        self.got.append((step, dict(metrics)))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.got]


class LoggingTrainer(StubTrainer):
    __slots__ = ("logger", "loggers")

    def __init__(self) -> None:
        super().__init__()
        self.logger: Any = Sink()
        self.loggers: list[Any] = []


def fit(*callbacks: Any, **options: Any) -> LoggingTrainer:
    trainer = LoggingTrainer()
    Loop(*callbacks, epochs=3, trainer=trainer, **options).fit()
    return trainer


def test_costs_of_each_checkpoint_go_to_the_trainers_logger(tmp_path: Path) -> None:
    callback = PartialCheckpointCallback(tmp_path)
    sink = fit(callback).logger
    assert sink.steps == [2, 4, 6]
    for (_, metrics), report in zip(sink.got, callback.reports, strict=True):
        assert metrics.keys() == NAMES
        assert metrics["checkpoint/bytes"] == report.bytes
        assert metrics["checkpoint/write_secs"] == report.write_secs
        assert metrics["checkpoint/finalize_secs"] == report.finalize_secs
        assert 0 < metrics["checkpoint/blocked_secs"] <= report.blocked_secs


def test_all_loggers_are_told_once_whatever_the_number_of_callbacks(tmp_path: Path) -> None:
    hook, sinks = FinalizeHook(), [Sink(), Sink()]
    callbacks = [PartialCheckpointCallback(tmp_path, finalizer=hook) for _ in range(2)]
    trainer = LoggingTrainer()
    trainer.loggers = sinks
    Loop(*callbacks, epochs=2, trainer=trainer).fit()
    assert [sink.steps for sink in sinks] == [[2, 4], [2, 4]]


def test_function_is_told_in_place_of_the_logger(tmp_path: Path) -> None:
    sink = Sink()
    trainer = fit(PartialCheckpointCallback(tmp_path, on_metrics=sink.log_metrics))
    assert sink.steps == [2, 4, 6]
    assert trainer.logger.got == []


def test_costs_are_told_while_training_goes_on(tmp_path: Path) -> None:
    def look(trainer: StubTrainer) -> None:
        if trainer.global_step == 2:
            while fp.steps(tmp_path) != [1]:
                pause.wait(0.01)
            callback.finalizer.wait()
        seen.append(list(sink.steps))

    sink, seen, pause = Sink(), [], threading.Event()
    callback = PartialCheckpointCallback(
        tmp_path, every_n_epochs=None, every_n_train_steps=1, on_metrics=sink.log_metrics
    )
    Loop(callback, batches=4, at={"on_train_batch_end": look}).fit()
    assert seen[0] == []
    assert 1 in seen[2]
    assert sink.steps == [1, 2, 3, 4]


class SinkError(Exception):
    """What a user's function raises."""


def test_error_of_the_function_is_raised_once_and_harms_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Mapping[str, float], step: int) -> None:
        raise SinkError(step)

    callback = PartialCheckpointCallback(tmp_path, on_metrics=fail)
    with pytest.raises(SinkError) as caught:
        Loop(callback).fit()
    assert caught.value.args == (2,)
    assert names_in(tmp_path) == ["2"]
    assert fp.verify(tmp_path / "2").ok
    assert callback.failed_saves == 0
    assert "could not be told" not in caplog.text


def test_each_checkpoint_has_one_line_in_the_log_and_the_package_no_handler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flax_partial")
    fit(PartialCheckpointCallback(tmp_path, keep_last=1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for line, step in zip(lines, (2, 4, 6), strict=True):
        assert line.startswith(f"Finalized {tmp_path / str(step)}: 19.2 kB in 9 groups; held ")
    assert all(record.name.startswith("flax_partial.") for record in caplog.records)
    named = [name for name in logging.root.manager.loggerDict if name.startswith("flax_partial")]
    assert not any(logging.getLogger(name).handlers for name in named)
