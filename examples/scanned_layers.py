"""Trains a scanned language model, and checkpoints its stacked layers one at a time.

The model is that of `pipeline_lm.py`, but all its blocks are stacked: each of their parameters is
one array `[layers, ...]`, over which the training step scans, and which is sharded over a stage
axis. The callback takes it by `stacked={"params.blocks": 0}`. It saves layer after layer, with its
optimizer state, and takes from the host's memory no more than `--max-inflight-mb` allows.

    python examples/scanned_layers.py               train, or go on where the last run stopped

At the end it measures what one saved step takes of the host's memory, layer by layer and whole,
each in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_command
from lm_command import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lm_scanned import ScannedModel
    from lm_text import Batches
    from trainer import Trainer

    from flax_partial.callbacks import PartialCheckpointCallback

MEASURED = {"nothing": "not saved", "layers": "saved layer by layer", "whole": "saved whole"}
"""Ways to save a step; the first is what the others are compared with."""
MEASURED_STEPS, SAVED_STEP = 4, 2


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line: the shared one, and how memory is bounded."""
    parser = lm_command.make_parser(
        "Train a scanned language model, its stacked layers saved one at a time.",
        "runs/scanned_layers",
    )
    parser.set_defaults(epochs=2, layers=16, width=192, steps_per_epoch=4)
    add = parser.add_argument_group("host memory").add_argument
    at_least_1, waiting = lm_command.at_least(1), "what layers that wait to be written may take"
    add("--max-inflight-mb", type=at_least_1, default=16, metavar="MB", help=waiting)
    add("--no-measure", action="store_true", help="skip what is measured last")
    only = "only measure one step, saved so, in this process, and print bytes"
    add("--measure", choices=MEASURED, help=only)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example, or one of its measurements; returns its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    work, claims = train, not options.no_checkpoint
    if options.measure is not None:
        work, claims = measure, False
    return lm_command.run(parser, options, check=check_options, work=work, claims=claims)


def check_options(options: argparse.Namespace) -> Batches:
    """Checks the options against each other, the devices and the text; returns the batches.

    Raises:
        UsageError: they conflict.
    """
    import jax
    from lm_scanned import WINDOWS

    most = len(jax.devices())
    if options.stages > most:
        raise UsageError(f"argument --stages: {options.stages} are more than the {most} devices")
    for what, number in (("layers", options.layers), ("windows of a batch", WINDOWS)):
        if number % options.stages:
            raise UsageError(
                f"argument --stages: the {number} {what} cannot be spread evenly over "
                f"{options.stages} stages"
            )
    return lm_command.read_text(options, windows=WINDOWS)


def make_module(options: argparse.Namespace, batches: Batches) -> ScannedModel:
    """Returns the model at its start."""
    from lm_scanned import ScannedModel

    config = lm_command.model_config(options)
    return ScannedModel(config, batches, stages=options.stages, seed=options.seed)


def make_callback(
    options: argparse.Namespace, *, by_layer: bool = True, **schedule: Any
) -> PartialCheckpointCallback:
    """Returns the callback, with the blocks declared as stacked if `by_layer`."""
    from lm_scanned import STACK

    import flax_partial as fp
    from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

    return PartialCheckpointCallback(
        options.directory,
        **schedule,
        stacked={f"params.{STACK}": 0} if by_layer else None,
        keep_last=lm_command.KEEP_LAST,
        finalizer=FinalizeHook(),
        options=fp.SaveOptions(
            max_inflight_bytes=options.max_inflight_mb << 20 if by_layer else None
        ),
    )


def train(options: argparse.Namespace, batches: Batches) -> int:
    """Trains from the newest checkpoint, or from the beginning, then measures what saving takes."""
    from lm_screen import show_training

    schedule = {"every_n_epochs": 1, "every_n_train_steps": options.checkpoint_every}
    show_training(
        "Building the model.",
        lambda: make_module(options, batches),
        None if options.no_checkpoint else make_callback(options, **schedule),
        max_epochs=options.epochs,
    )
    if not options.no_measure:
        compare(options)
    return 0


def compare(options: argparse.Namespace) -> None:
    """Measures one step in fresh processes, one for each way to save it, and shows the figures."""
    print("host memory that training takes from the end of a step on, each in a fresh process:")
    plain_mb = 0.0
    names = ("stages", "seed", "layers", "width", "max_inflight_mb")
    passed = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    with tempfile.TemporaryDirectory(prefix="scanned_layers.") as directory:
        environment = {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # memory that is freed goes back at once
            "JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled",
        }
        for how, said in MEASURED.items():
            chosen = [f"--measure={how}", f"--directory={directory}/{how}"]
            done = subprocess.run(  # noqa: S603 - this very program
                [sys.executable, __file__, *passed, *chosen],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            state, before, peak = map(int, done.stdout.split())
            taken_mb = (peak - before) / 1e6
            saving = f", {taken_mb - plain_mb:4.0f} MB of it for saving" if plain_mb else ""
            print(f"  {said:20} {taken_mb:5.0f} MB{saving}")
            plain_mb = plain_mb or taken_mb
    print(f"  (the state has {state / 1e6:.0f} MB)")


def measure(options: argparse.Namespace, batches: Batches) -> int:
    """Trains some steps, of which one is saved.

    Prints bytes of the state; of the process when that step had ended; its peak from then on.
    """
    import jax
    from trainer import Trainer

    probe = Probe()
    callbacks: list[Any] = [probe]
    if options.measure != "nothing":
        by_layer = options.measure == "layers"
        schedule = {"every_n_epochs": None, "every_n_train_steps": SAVED_STEP}
        callbacks.append(make_callback(options, by_layer=by_layer, **schedule))
    module = make_module(options, replace(batches, per_epoch=MEASURED_STEPS))
    Trainer(max_epochs=1, callbacks=callbacks).fit(module)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(module.state()))
    print(state, probe.before, _peak_bytes())
    return 0


class Probe:
    """A callback of the trainer, before the one that saves: resets the peak when a step has ended.

    The steps before have touched all memory that a step needs, and nothing is being computed then.

    Attributes:
        before: what the process has then, in bytes.
    """

    before = 0

    def on_train_batch_end(self, trainer: Trainer, module: ScannedModel, *_: object) -> None:
        """Begins to measure when the step to save has ended."""
        if trainer.global_step == SAVED_STEP:
            import jax

            jax.block_until_ready(module.state())
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
            self.before = _peak_bytes()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    sys.exit(main())
