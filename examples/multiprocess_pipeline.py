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
from typing import TYPE_CHECKING, Any

import lm_command
import pipeline_lm
from lm_command import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from lm_text import Batches
    from trainer import Trainer

MOST_RESTARTS = 3
_POLL_SECS = 0.05


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line: the shared one, and what several processes add."""
    parser = lm_command.make_parser(
        "Train a small language model with one process for each pipeline stage.",
        "runs/multiprocess_pipeline",
    )
    add = parser.add_argument_group("processes").add_argument
    add("--processes", dest="stages", type=int, default=4, metavar="N", help="as --stages")
    add("--kill-stage", type=int, metavar="STAGE", help="kill this stage's process once")
    add("--at-step", type=int, default=1, metavar="STEP", help="while it saves this step")
    add("--place", type=int, nargs=2, metavar=("STAGE", "PORT"), help="for the processes' own use")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all processes, or one of them; returns its exit status."""
    parser = make_parser()
    passed = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(passed)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.place is not None:
        return lm_command.run(parser, options, check=check_options, work=run_stage, claims=False)

    def work(options: argparse.Namespace, _: Batches) -> int:
        return run_job(options, passed)

    return lm_command.run(parser, options, check=check_options, work=work, claims=True)


def check_options(options: argparse.Namespace) -> Batches:
    """Checks the options, as `pipeline_lm.py` does its own, and returns the batches.

    Raises:
        UsageError: they conflict.
    """
    stages = range(options.stages)
    if not stages:
        raise UsageError(f"argument --processes: {options.stages} is below 1")
    if options.kill_stage is not None and options.kill_stage not in stages:
        raise UsageError(
            f"argument --kill-stage: {options.kill_stage} is not between 0 and {stages[-1]}"
        )
    if options.no_checkpoint:
        raise UsageError("argument --no-checkpoint: only pipeline_lm.py has it")
    return pipeline_lm.check_options(options)


def run_job(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs all stages to their end; starts all of them again if one was killed."""
    for _ in range(MOST_RESTARTS + 1):
        failed = run_processes(options.stages, arguments)
        if failed is None:
            show_result(options.directory)
            return lm_command.draw_timeline(options)
        stage, status = failed
        if status >= 0:
            print(f"Stage {stage} failed with exit status {status}.", file=sys.stderr)
            return 1
        print(f"Stage {stage} was killed by signal {-status}: starting all stages again.")
        arguments = [*arguments, "--at-step", "0"]
    print(f"Given up after {MOST_RESTARTS} restarts.", file=sys.stderr)
    return 1


def run_processes(count: int, arguments: Sequence[str]) -> tuple[int, int] | None:
    """Runs a process for each stage; kills all when one fails, and returns it and its status."""
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


def run_stage(options: argparse.Namespace, batches: Batches) -> int:
    """Trains one stage in this process, one of several."""
    import jax

    number, port = options.place
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, options.stages, number, coordinator_bind_address=address)

    from lm_module import MICRO_BATCHES, WINDOWS, PipelineModel
    from lm_pipeline import make_own_stage
    from lm_screen import Lines
    from trainer import Trainer

    checkpoints = pipeline_lm.make_callback(options)
    config = lm_command.model_config(options)
    own = make_own_stage(config, windows=WINDOWS // MICRO_BATCHES)
    module = PipelineModel(config, batches, [own], seed=options.seed)
    callbacks: list[object] = [Lines(number, checkpoints), checkpoints]
    if number == options.kill_stage:
        callbacks.append(Kill(options.at_step))
    Trainer(max_epochs=options.epochs, callbacks=callbacks).fit(module)
    jax.distributed.shutdown()
    return 0


class Kill:
    """Kills this process, as a callback of the trainer, while a step's layers stream."""

    def __init__(self, step: int) -> None:
        """Chooses the step that `global_step` counts as `step`; 0 for none."""
        self._step = step

    def on_layer_ready(self, trainer: Trainer, _name: str, _tree: Any) -> None:
        """Kills, once the first layer was handed over."""
        if trainer.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def show_result(directory: Path) -> None:
    """Shows a fingerprint of the parameters in the newest checkpoint."""
    from lm_module import digest

    import flax_partial as fp

    newest = fp.latest(directory)
    if newest is not None:
        state = fp.load(newest)
        print(f"newest checkpoint: {newest}")
        print(f"parameters:      {digest(state['params'])}")


if __name__ == "__main__":
    sys.exit(main())
