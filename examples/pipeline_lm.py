"""Trains a small language model on pipeline stages, and checkpoints it layer by layer.

A Flax NNX transformer learns the help texts that come with Python. Its layers are spread over
pipeline stages on four virtual CPU devices. In a step that is saved, each stage's parameters and
optimizer state stream into the checkpoint the moment that stage's update is issued, while the
other stages still compute; the checkpoint is finalized in the background.

    python examples/pipeline_lm.py                  train, or go on where the last run stopped
    python examples/pipeline_lm.py --stages 2       go on with two stages instead of four
    python examples/pipeline_lm.py --timeline t.png    train, then draw what was saved when

Kill it at any moment and run it again: it ends with the very bits that it would have ended with.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import lm_command
from lm_command import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lm_text import Batches

    from flax_partial.callbacks import PartialCheckpointCallback

MAX_INFLIGHT_BYTES = 256 * 2**20


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    return lm_command.make_parser(
        "Train a small language model on pipeline stages, checkpointed layer by layer.",
        "runs/pipeline_lm",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    return lm_command.run(
        parser, options, check=check_options, work=train, claims=not options.no_checkpoint
    )


def check_options(options: argparse.Namespace) -> Batches:
    """Checks the options against each other and the text; returns the batches.

    Raises:
        UsageError: they conflict.
    """
    if options.no_checkpoint and options.timeline is not None:
        raise UsageError("argument --timeline: --no-checkpoint leaves nothing to draw")
    if options.stages > options.layers:
        raise UsageError(
            f"argument --stages: {options.stages} is not between 1 and the number of layers, "
            f"{options.layers}"
        )
    from lm_module import WINDOWS

    return lm_command.read_text(options, windows=WINDOWS)


def make_callback(options: argparse.Namespace) -> PartialCheckpointCallback:
    """Returns the callback that saves after every epoch, and as often as the options say."""
    import flax_partial as fp
    from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

    return PartialCheckpointCallback(
        options.directory,
        every_n_epochs=1,
        every_n_train_steps=options.checkpoint_every,
        group_by=lambda path: str(path[0].key),  # what no stage streams: keys, counters, metrics
        keep_last=lm_command.KEEP_LAST,
        finalizer=FinalizeHook(),
        # Saving after every step, training would otherwise run further and further ahead.
        options=fp.SaveOptions(max_inflight_bytes=MAX_INFLIGHT_BYTES),
    )


def train(options: argparse.Namespace, batches: Batches) -> int:
    """Trains from the newest checkpoint, or from the beginning; returns the exit status."""
    from lm_module import PipelineModel
    from lm_pipeline import make_stages
    from lm_screen import show_training

    config = lm_command.model_config(options)
    show_training(
        "Building the model and its pipeline stages.",
        lambda: PipelineModel(
            config, batches, make_stages(config, options.stages), seed=options.seed
        ),
        None if options.no_checkpoint else make_callback(options),
        max_epochs=options.epochs,
    )
    return 0 if options.no_checkpoint else lm_command.draw_timeline(options)


if __name__ == "__main__":
    sys.exit(main())
