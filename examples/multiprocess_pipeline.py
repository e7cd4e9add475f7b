"""Trains the model of `pipeline_lm.py` with one process for each stage, and checkpoints it.

Every process has its own trainer and its own callback, runs its own program and holds its own
layers only; activations and gradients pass between neighbours by collectives of two. Each streams
its layers into the one checkpoint of a step, which appears when all have saved: nowhere is the
model ever put together.

    python examples/multiprocess_pipeline.py --processes 4
    python examples/multiprocess_pipeline.py --processes 2        go on with two of them
    python examples/multiprocess_pipeline.py --kill-stage 2 --at-step 70

The last one kills a stage in the middle of its saves: all processes are started again and go on
from the newest checkpoint, to the very bits that they would have ended with.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_directory
import pipeline_lm

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lm_stage import StageModule
    from lm_text import Corpus
    from trainer import Trainer

    from flax_partial.callbacks import PartialCheckpointCallback

MOST_RESTARTS = 3
_POLL_SECS = 0.05


def make_parser() -> argparse.ArgumentParser:
    """The command line: that of `pipeline_lm.py`, and what several processes add."""
    parser = pipeline_lm.make_parser()
    parser.description = "Train a small language model with one process for each pipeline stage."
    parser.set_defaults(directory=Path("runs/multiprocess_pipeline"))
    add = parser.add_argument_group("processes").add_argument
    add("--processes", dest="stages", type=int, default=4, metavar="N", help="as --stages")
    add("--kill-stage", type=int, metavar="STAGE", help="kill this stage's process once")
    add("--at-step", type=int, default=1, metavar="STEP", help="while it saves this step")
    add("--place", type=int, nargs=2, metavar=("STAGE", "PORT"), help="for the processes' own use")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes, and again if one of them is killed; or is one of them."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        corpus = check_options(options)
        if options.place is not None:
            run_stage(options, corpus)
            return 0
        with lm_directory.claim(options.directory, pipeline_lm.identity(options, corpus)):
            return run_job(options, list(sys.argv[1:] if arguments is None else arguments))
    except pipeline_lm.UsageError as error:
        parser.error(str(error))
    except lm_directory.DirectoryError as error:
        parser.error(f"argument --directory: {error}")


def check_options(options: argparse.Namespace) -> Corpus:
    """Checks the options, as `pipeline_lm.py` does its own, and returns the text.

    Raises:
        UsageError: They ask for what cannot be built.
    """
    stages = range(options.stages)
    if not stages:
        raise pipeline_lm.UsageError(f"argument --processes: {options.stages} is below 1")
    if options.kill_stage is not None and options.kill_stage not in stages:
        raise pipeline_lm.UsageError(
            f"argument --kill-stage: {options.kill_stage} is not between 0 and {stages[-1]}"
        )
    if options.no_checkpoint:
        raise pipeline_lm.UsageError("argument --no-checkpoint: only pipeline_lm.py has it")
    return pipeline_lm.check_options(options)


def run_job(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs all stages to their end; a job from which one was killed is started again."""
    for _ in range(MOST_RESTARTS + 1):
        failed = run_processes(options.stages, arguments)
        if failed is None:
            show_result(options.directory)
            return pipeline_lm.draw_timeline(options)
        stage, status = failed
        if status >= 0:
            print(f"Stage {stage} failed with exit status {status}.", file=sys.stderr)
            return 1
        print(f"Stage {stage} was killed by signal {-status}: starting all stages again.")
        arguments = [*arguments, "--at-step", "0"]
    print(f"Given up after {MOST_RESTARTS} restarts.", file=sys.stderr)
    return 1


def run_processes(count: int, arguments: Sequence[str]) -> tuple[int, int] | None:
    """Runs a process for each stage; the first that fails, with its status, ends all others."""
    port = _free_port()
    command = [sys.executable, __file__, *arguments, "--place"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    processes = [
        subprocess.Popen([*command, str(stage), str(port)], env=environment)  # noqa: S603
        for stage in range(count)
    ]
    try:
        return _first_failure(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    while True:
        statuses = [process.poll() for process in processes]
        # Of several, the one that was killed: the others only failed to reach it.
        for stage, status in sorted(enumerate(statuses), key=lambda item: item[1] or 0):
            if status:
                return stage, status
        if None not in statuses:
            return None
        time.sleep(_POLL_SECS)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def run_stage(options: argparse.Namespace, corpus: Corpus) -> None:
    """Is one of the processes: trains its stage."""
    import jax

    stage, port = options.place
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, options.stages, stage, coordinator_bind_address=address)

    from lm_model import ModelConfig
    from lm_stage import StageModule
    from trainer import Trainer

    checkpoints = pipeline_lm.make_callback(options)
    module = StageModule(
        ModelConfig(pipeline_lm.VOCABULARY, pipeline_lm.LENGTH, options.width, options.layers),
        corpus,
        batches_per_epoch=options.steps_per_epoch,
        seed=options.seed,
    )
    callbacks: list[object] = [Lines(stage, checkpoints), checkpoints]
    if stage == options.kill_stage:
        callbacks.append(Kill(options.at_step))
    Trainer(max_epochs=options.epochs, callbacks=callbacks).fit(module)
    jax.distributed.shutdown()


class Lines:
    """Says, as a callback of the trainer, what a stage does; its own lines only."""

    def __init__(self, stage: int, checkpoints: PartialCheckpointCallback) -> None:
        """Shows on standard output."""
        self._stage = stage
        self._checkpoints = checkpoints
        self._streamed: list[str] = []

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Says where training begins."""
        del module
        if trainer.resumed_at is not None:
            self._say(f"resumed at step {trainer.resumed_at}")

    def on_layer_ready(self, trainer: Trainer, name: str, tree: Any) -> None:
        """Takes note of the order in which layers are streamed."""
        del tree
        if self._checkpoints.will_save(trainer):
            self._streamed.append(name)

    def on_train_batch_end(
        self, trainer: Trainer, module: StageModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a saved step, says what was streamed."""
        del module, outputs, batch, batch_idx
        if self._streamed:
            self._say(f"step {trainer.global_step}: streamed {', '.join(self._streamed)}")
            self._streamed.clear()

    def on_train_epoch_end(self, trainer: Trainer, module: StageModule) -> None:
        """Says the epoch's mean loss, which the last stage knows."""
        if module.is_last:
            loss = float(module.epoch_loss)
            self._say(f"epoch {trainer.current_epoch + 1}: mean loss {loss:.4f}")

    def teardown(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Says what the checkpoints cost."""
        del trainer, module, stage
        for report in self._checkpoints.reports:
            blocked, finalize = report.blocked_secs * 1e3, report.finalize_secs * 1e3
            self._say(
                f"checkpoint {report.step}: {len(report.groups)} groups of this stage, training "
                f"blocked {blocked:.0f} ms, finalized in {finalize:.0f} ms"
            )

    def _say(self, text: str) -> None:
        sys.stdout.write(f"[stage {self._stage}] {text}\n")  # at once: other stages write here too
        sys.stdout.flush()


class Kill:
    """Kills its own process, as a callback of the trainer, while a step's layers stream."""

    def __init__(self, step: int) -> None:
        """Prepares to do it in the step that `global_step` counts as `step`; 0 stands for never."""
        self._step = step

    def on_layer_ready(self, trainer: Trainer, name: str, tree: Any) -> None:
        """Does it, once the first layer was handed over."""
        del name, tree
        if trainer.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def show_result(directory: Path) -> None:
    """Shows a fingerprint of what was trained, as it stands in the newest checkpoint."""
    from lm_module import digest

    import flax_partial as fp

    newest = fp.latest(directory)
    if newest is not None:
        state = fp.load(newest)
        print(f"newest checkpoint: {newest}")
        print(f"parameters:      {digest(state['params'])}")


if __name__ == "__main__":
    sys.exit(main())
