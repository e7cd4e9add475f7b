"""Trains a scanned language model, and checkpoints its stacked layers one at a time.

The model is that of `pipeline_lm.py`, but all its blocks are stacked: each of their parameters is
one array `[layers, ...]`, over which the training step scans, and which is sharded over a stage
axis. `stacked={"params.blocks": 0}` tells the callback so. It saves layer after layer, with its
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_directory
import pipeline_lm
from pipeline_lm import DEVICES, KEEP_LAST, LENGTH, VOCABULARY, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lm_scanned import ScannedModel
    from lm_text import Corpus
    from trainer import Trainer

    from flax_partial.callbacks import PartialCheckpointCallback

MEASURED = {"nothing": "not saved", "layers": "saved layer by layer", "whole": "saved whole"}
"""Ways to save a step; the first is what the others are compared with."""
MEASURED_STEPS, SAVED_STEP = 4, 2


def make_parser() -> argparse.ArgumentParser:
    """The command line: that of `pipeline_lm.py`, and what it has no use for."""
    parser = pipeline_lm.make_parser()
    parser.description = "Train a scanned language model, its stacked layers saved one at a time."
    parser.set_defaults(directory=Path("runs/scanned_layers"), epochs=2, layers=16, width=192)
    parser.set_defaults(steps_per_epoch=4)
    memory = parser.add_argument_group("host memory")
    memory.add_argument(
        "--max-inflight-mb",
        type=pipeline_lm._at_least(1),  # noqa: SLF001 - of the same program
        default=16,
        metavar="MB",
        help="what layers that wait to be written may take",
    )
    memory.add_argument("--no-measure", action="store_true", help="skip what is measured last")
    memory.add_argument(
        "--measure",
        choices=MEASURED,
        help="only measure one step, saved so, in this process, and print bytes",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit status: 2 for wrong options, 130 for Ctrl-C."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    # Before JAX is imported, which is why this module's other imports stand in functions.
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        corpus = check_options(options)
        if options.measure is not None:
            print(*measure(options, corpus))
        elif options.no_checkpoint:
            train(options, corpus)
        else:
            with lm_directory.claim(options.directory, pipeline_lm.identity(options, corpus)):
                train(options, corpus)
        if options.measure is None and not options.no_measure:
            compare(options)
    except UsageError as error:
        parser.error(str(error))
    except lm_directory.DirectoryError as error:
        parser.error(f"argument --directory: {error}")
    except KeyboardInterrupt:
        print(pipeline_lm.how_to_continue(options), file=sys.stderr)
        return 130
    return 0


def check_options(options: argparse.Namespace) -> Corpus:
    """Checks the options against each other and the text, which it returns.

    Raises:
        UsageError: They ask for what cannot be built.
    """
    import jax
    from lm_model import HEAD_WIDTH
    from lm_scanned import WINDOWS
    from lm_text import count_windows, read_corpus

    if options.width % HEAD_WIDTH:
        raise UsageError(f"argument --width: {options.width} is not a multiple of {HEAD_WIDTH}")
    most = len(jax.devices())
    if options.stages > most:
        raise UsageError(f"argument --stages: {options.stages} are more than the {most} devices")
    for what, number in (("layers", options.layers), ("windows of a batch", WINDOWS)):
        if number % options.stages:
            raise UsageError(
                f"argument --stages: the {number} {what} cannot be spread evenly over "
                f"{options.stages} stages"
            )
    corpus = read_corpus(VOCABULARY)
    most = count_windows(corpus, LENGTH) // WINDOWS
    if options.steps_per_epoch > most:
        raise UsageError(
            f"argument --steps-per-epoch: {options.steps_per_epoch} batches are more than the "
            f"{most} that the text has"
        )
    return corpus


def make_module(options: argparse.Namespace, corpus: Corpus, *, steps: int) -> ScannedModel:
    """The model at its start."""
    from lm_model import ModelConfig
    from lm_scanned import ScannedModel

    return ScannedModel(
        ModelConfig(VOCABULARY, LENGTH, options.width, options.layers),
        corpus,
        stages=options.stages,
        batches_per_epoch=steps,
        seed=options.seed,
    )


def make_callback(
    options: argparse.Namespace, *, by_layer: bool = True, **schedule: Any
) -> PartialCheckpointCallback:
    """The callback, which is told that the blocks are stacked; or not, to compare."""
    from lm_scanned import STACK

    import flax_partial as fp
    from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

    return PartialCheckpointCallback(
        options.directory,
        **schedule,
        stacked={f"params.{STACK}": 0} if by_layer else None,
        keep_last=KEEP_LAST,
        finalizer=FinalizeHook(),
        options=fp.SaveOptions(
            max_inflight_bytes=options.max_inflight_mb << 20 if by_layer else None
        ),
    )


def train(options: argparse.Namespace, corpus: Corpus) -> None:
    """Trains from the newest checkpoint, or from the beginning, and shows what came of it."""
    from lm_screen import Screen
    from trainer import Trainer

    schedule = {"every_n_epochs": 1, "every_n_train_steps": options.checkpoint_every}
    checkpoints = None if options.no_checkpoint else make_callback(options, **schedule)
    screen = Screen(checkpoints)
    screen.say("Building the model.")
    module = make_module(options, corpus, steps=options.steps_per_epoch)
    callbacks = [screen] if checkpoints is None else [screen, checkpoints]
    Trainer(max_epochs=options.epochs, callbacks=callbacks).fit(module)
    screen.show_result(module)


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


def measure(options: argparse.Namespace, corpus: Corpus) -> tuple[int, int, int]:
    """Trains some steps, of which one is saved.

    Returns:
        Bytes of the state; of the process when that step had ended; and its peak from then on.
    """
    import jax
    from trainer import Trainer

    probe = Probe()
    callbacks: list[Any] = [probe]
    if options.measure != "nothing":
        by_layer = options.measure == "layers"
        schedule = {"every_n_epochs": None, "every_n_train_steps": SAVED_STEP}
        callbacks.append(make_callback(options, by_layer=by_layer, **schedule))
    module = make_module(options, corpus, steps=MEASURED_STEPS)
    Trainer(max_epochs=1, callbacks=callbacks).fit(module)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(module.state()))
    return state, probe.before, _peak_bytes()


class Probe:
    """A callback of the trainer, before the one that saves: forgets the peak of the steps before.

    They have touched all memory that a step needs, and nothing is being computed any more.

    Attributes:
        before: what the process has then, in bytes.
    """

    before = 0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: ScannedModel,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Begins to measure when the step to save has ended."""
        del outputs, batch, batch_idx
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
