"""What the example shows: a bar while it trains, a line for each epoch, a table at the end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from lm_module import digest
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_module import LanguageModel
    from trainer import Trainer

    from flax_partial.callbacks import CheckpointReport, PartialCheckpointCallback


class Screen:
    """A callback of the trainer that shows how training goes.

    In a pipe there is no bar, only the lines. Nothing here waits for a result: the loss shown is
    that of the step before, which the trainer has waited for.
    """

    def __init__(self, checkpoints: PartialCheckpointCallback | None) -> None:
        """Shows on standard output; `checkpoints` tells which steps are saved and what it took."""
        self._console = Console()
        self._checkpoints = checkpoints
        self._streamed: list[str] = []
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
        """Says where training begins."""
        self._started = time.perf_counter()
        if trainer.resumed_at is not None:
            self.say(f"Resumed at step {trainer.resumed_at}{_place(trainer, module)}.")
        elif self._checkpoints is not None:
            self.say(f"No checkpoint in {self._checkpoints.directory} yet: from the beginning.")
        if trainer.current_epoch >= trainer.max_epochs:
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

    def on_layer_ready(self, trainer: Trainer, name: str, tree: Any) -> None:
        """Takes note of the order in which layers are streamed."""
        del tree
        if self._checkpoints is not None and self._checkpoints.will_save(trainer):
            self._streamed.append(name)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LanguageModel,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves the bar; after a saved step, says what was streamed."""
        del module, batch
        shown = "" if self._loss is None else f"{float(self._loss):.3f}"
        self._loss = outputs["loss"]
        self._steps += 1
        self._bar.update(self._task, completed=batch_idx + 1, loss=shown)
        if self._streamed:
            self.say(f"step {trainer.global_step}: streaming {', '.join(self._streamed)}")
            self._streamed.clear()

    def on_train_epoch_end(self, trainer: Trainer, module: LanguageModel) -> None:
        """Says the epoch's mean loss."""
        self.say(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: "
            f"mean loss {float(module.epoch_loss):.4f}"
        )

    def teardown(self, trainer: Trainer, module: LanguageModel, stage: str) -> None:
        """Removes the bar."""
        del module, stage
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


def _place(trainer: Trainer, module: LanguageModel) -> str:
    if trainer.current_epoch >= trainer.max_epochs:
        return ""
    done = f"{trainer.batches_done} of {module.batches_per_epoch} batches done"
    return f", in epoch {trainer.current_epoch + 1} with {done}"


def checkpoint_table(reports: Sequence[CheckpointReport]) -> Table:
    """One row for each checkpoint that was finalized in this run."""
    table = Table(
        box=box.SIMPLE,
        title="Checkpoints of this run",
        caption="Training waits for the last one before it ends.",
    )
    table.add_column("checkpoint", justify="right")
    for heading in ("groups", "MB", "training blocked", "written in", "finalized in"):
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(
            str(report.step),
            str(len(report.groups)),
            f"{report.bytes / 1e6:.1f}",
            _ms(report.blocked_secs),
            _ms(_elapsed_secs(report)),
            _ms(report.finalize_secs),
        )
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
