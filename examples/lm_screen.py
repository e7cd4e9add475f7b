"""What the examples show: a bar while one trains, a line for each epoch, a table at the end."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from lm_module import digest
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_module import LanguageModel, PipelineModel
    from lm_scanned import ScannedModel

    from flax_partial.callbacks import CheckpointReport, PartialCheckpointCallback


def show_training(
    text: str,
    make_model: Callable[[], PipelineModel | ScannedModel],
    checkpoints: PartialCheckpointCallback | None,
    *,
    max_epochs: int,
) -> None:
    """Trains a model, from the newest checkpoint or from the beginning, and shows the result.

    Args:
        text: shown before the model is made.
        make_model: returns the model at its start.
        checkpoints: restores and saves; None for neither.
        max_epochs: the epoch to stop before.
    """
    screen = Screen(checkpoints)
    screen.say(text)
    model = make_model()
    callbacks = [screen] if checkpoints is None else [screen, checkpoints]
    Trainer(max_epochs=max_epochs, callbacks=callbacks).fit(model)
    screen.show_result(model)


class Streamed:
    """Collects, as a callback of the trainer, the names of the layers that stream in a step."""

    def __init__(self, checkpoints: PartialCheckpointCallback | None) -> None:
        """Takes from `checkpoints` which steps are saved."""
        self._checkpoints = checkpoints
        self._names: list[str] = []

    def on_layer_ready(self, trainer: Trainer, name: str, _tree: Any) -> None:
        """Adds a layer."""
        if self._checkpoints is not None and self._checkpoints.will_save(trainer):
            self._names.append(name)

    def take_names(self) -> str:
        """Returns the names in the order of streaming, and forgets them."""
        names = ", ".join(self._names)
        self._names.clear()
        return names


class Screen(Streamed):
    """A callback of the trainer that shows how training goes.

    In a pipe there is no bar, only the lines. Nothing here waits for a result: the loss shown is
    that of the step before, which the trainer has waited for.
    """

    def __init__(self, checkpoints: PartialCheckpointCallback | None) -> None:
        """Shows on standard output; `checkpoints` has the saved steps and their cost."""
        super().__init__(checkpoints)
        self._console = Console()
        self._steps = 0
        self._started = 0.0
        self._loss: Any = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", loss="", start=False)
        logging.getLogger("flax_partial").addHandler(_Handler(self))

    def on_train_start(self, trainer: Trainer, module: LanguageModel) -> None:
        """Shows where training begins."""
        self._started = time.perf_counter()
        is_complete = trainer.current_epoch >= trainer.max_epochs
        if trainer.resumed_at is not None:
            done = f"{trainer.batches_done} of {module.batches_per_epoch} batches done"
            place = "" if is_complete else f", in epoch {trainer.current_epoch + 1} with {done}"
            self.say(f"Resumed at step {trainer.resumed_at}{place}.")
        elif self._checkpoints is not None:
            self.say(f"No checkpoint in {self._checkpoints.directory} yet: from the beginning.")
        if is_complete:
            self.say(
                f"Training is complete: {trainer.current_epoch} epochs are done, and "
                f"{trainer.max_epochs} were asked for."
            )
        else:
            self._bar.start()

    def on_train_epoch_start(self, trainer: Trainer, module: LanguageModel) -> None:
        """Begins a new bar."""
        self._bar.reset(
            self._task,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            completed=trainer.batches_done,
            total=module.batches_per_epoch,
        )

    def on_train_batch_end(
        self, trainer: Trainer, _module: object, outputs: Any, _batch: object, batch_idx: int
    ) -> None:
        """Moves the bar; after a saved step, shows what was streamed."""
        shown = "" if self._loss is None else f"{float(self._loss):.3f}"
        self._loss = outputs["loss"]
        self._steps += 1
        self._bar.update(self._task, completed=batch_idx + 1, loss=shown)
        if names := self.take_names():
            self.say(f"step {trainer.global_step}: streaming {names}")

    def on_train_epoch_end(self, trainer: Trainer, module: LanguageModel) -> None:
        """Shows the epoch's mean loss."""
        self.say(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: "
            f"mean loss {float(module.epoch_loss):.4f}"
        )

    def teardown(self, trainer: Trainer, _module: object, _stage: str) -> None:
        """Removes the bar."""
        self._bar.stop()
        if self._steps and trainer.current_epoch >= trainer.max_epochs:
            self.say(f"{self._steps} steps in {time.perf_counter() - self._started:.1f} s")

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def show_result(self, module: LanguageModel) -> None:
        """Shows the checkpoints of this run, and fingerprints of what was trained."""
        if self._checkpoints is not None and self._checkpoints.reports:
            self._console.print(checkpoint_table(self._checkpoints.reports))
        state = module.state()
        self.say(f"mean loss of the last epoch: {float(module.epoch_loss):.4f}")
        self.say(f"parameters:      {digest(state['params'])}")
        self.say(f"optimizer state: {digest(state['opt_state'])}")


class Lines(Streamed):
    """A callback of the trainer that shows one stage of several processes, on lines of its own."""

    def __init__(self, stage: int, checkpoints: PartialCheckpointCallback) -> None:
        """Shows on standard output."""
        super().__init__(checkpoints)
        self._stage = stage
        self._cost = checkpoints

    def on_train_start(self, trainer: Trainer, _module: object) -> None:
        """Shows where training begins."""
        if trainer.resumed_at is not None:
            self._say(f"resumed at step {trainer.resumed_at}")

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """After a saved step, shows what was streamed."""
        if names := self.take_names():
            self._say(f"step {trainer.global_step}: streamed {names}")

    def on_train_epoch_end(self, trainer: Trainer, module: LanguageModel) -> None:
        """Shows the epoch's mean loss, which the last stage computes."""
        if module.epoch_loss is not None:
            loss = float(module.epoch_loss)
            self._say(f"epoch {trainer.current_epoch + 1}: mean loss {loss:.4f}")

    def teardown(self, *_: object) -> None:
        """Shows what the checkpoints cost."""
        for report in self._cost.reports:
            self._say(
                f"checkpoint {report.step}: {len(report.groups)} groups of this stage, training "
                f"blocked {_ms(report.blocked_secs)}, finalized in {_ms(report.finalize_secs)}"
            )

    def _say(self, text: str) -> None:
        sys.stdout.write(f"[stage {self._stage}] {text}\n")  # at once: other stages write here too
        sys.stdout.flush()


def checkpoint_table(reports: Sequence[CheckpointReport]) -> Table:
    """One row for each checkpoint that was finalized in this run."""
    headings = ("checkpoint", "groups", "MB", "training blocked", "written in", "finalized in")
    table = Table(
        *(Column(heading, justify="right") for heading in headings),
        box=box.SIMPLE,
        title="Checkpoints of this run",
        caption="Training waits for the last one before it ends.",
    )
    for report in reports:
        secs = (report.blocked_secs, _elapsed_secs(report), report.finalize_secs)
        numbers = (str(report.step), str(len(report.groups)), f"{report.bytes / 1e6:.1f}")
        table.add_row(*numbers, *map(_ms, secs))
    return table


def _elapsed_secs(report: CheckpointReport) -> float:
    """From the first group's write to the last one's commit: groups are written side by side."""
    saves = report.saves.values()
    began = min(save.committed_at - save.write_secs for save in saves)
    return max(save.committed_at for save in saves) - began


def _ms(secs: float) -> str:
    return f"{secs * 1e3:.0f} ms"


class _Handler(logging.Handler):
    """Shows what the package logs."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.say(record.getMessage(), style="yellow")
