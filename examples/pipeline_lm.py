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

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import lm_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_text import Corpus

    from flax_partial.callbacks import PartialCheckpointCallback

DEVICES = 4
VOCABULARY = 4096
LENGTH = 64
KEEP_LAST = 3
MAX_INFLIGHT_BYTES = 256 * 2**20


class UsageError(Exception):
    """The options do not fit each other, the text, or what is in the directory."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a small language model on pipeline stages, checkpointed layer by layer.",
        epilog="Run the same command again to go on where the last run stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--directory", type=Path, default=Path("runs/pipeline_lm"), help="of the checkpoints")
    add("--epochs", type=_at_least(1), default=4, metavar="N", help="train up to this epoch")
    add("--stages", type=_at_least(1), default=4, metavar="N", help="pipeline stages")
    add(
        "--checkpoint-every",
        type=_at_least(1),
        metavar="STEPS",
        help="checkpoint after each so many steps too, not only after each epoch",
    )
    add(
        "--timeline",
        type=_drawable,
        metavar="FILE",
        help="draw there what the newest checkpoint did when: .png, .svg, or .json for Perfetto",
    )
    add("--no-checkpoint", action="store_true", help="neither resume nor save anything")
    add("--seed", type=_at_least(0), default=0, metavar="N", help="of model, dropout and shuffling")
    size = parser.add_argument_group("size of the model and of an epoch")
    size.add_argument("--layers", type=_at_least(1), default=8, metavar="N", help="blocks")
    size.add_argument("--width", type=_at_least(1), default=128, metavar="N", help="features")
    size.add_argument(
        "--steps-per-epoch", type=_at_least(1), default=48, metavar="N", help="batches of an epoch"
    )
    return parser


def _drawable(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .svg or .json")
    return Path(text)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) < 2**32):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns its exit status: 2 for wrong options, 130 for Ctrl-C."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    # Before JAX is imported, which is why this module's other imports stand in functions.
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        corpus = check_options(options)
        if options.no_checkpoint:
            train(options, corpus)
        else:
            with lm_directory.claim(options.directory, identity(options, corpus)):
                train(options, corpus)
            return draw_timeline(options)
    except UsageError as error:
        parser.error(str(error))
    except lm_directory.DirectoryError as error:
        parser.error(f"argument --directory: {error}")
    except KeyboardInterrupt:
        print(how_to_continue(options), file=sys.stderr)
        return 130
    return 0


def check_options(options: argparse.Namespace) -> Corpus:
    """Checks the options against each other and the text, which it returns.

    Raises:
        UsageError: They ask for what cannot be built.
    """
    if options.no_checkpoint and options.timeline is not None:
        raise UsageError("argument --timeline: --no-checkpoint leaves nothing to draw")
    if options.stages > options.layers:
        raise UsageError(
            f"argument --stages: {options.stages} is not between 1 and the number of layers, "
            f"{options.layers}"
        )
    from lm_model import HEAD_WIDTH
    from lm_module import WINDOWS
    from lm_text import count_windows, read_corpus

    if options.width % HEAD_WIDTH:
        raise UsageError(f"argument --width: {options.width} is not a multiple of {HEAD_WIDTH}")
    corpus = read_corpus(VOCABULARY)
    most = count_windows(corpus, LENGTH) // WINDOWS
    if options.steps_per_epoch > most:
        raise UsageError(
            f"argument --steps-per-epoch: {options.steps_per_epoch} batches are more than the "
            f"{most} that the text has"
        )
    return corpus


def identity(options: argparse.Namespace, corpus: Corpus) -> dict[str, int | str]:
    """What a run cannot change when it goes on; the help texts differ between Python versions."""
    names = ("seed", "layers", "width", "steps_per_epoch")
    chosen = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    return {**chosen, "text": corpus.digest}


def make_callback(options: argparse.Namespace) -> PartialCheckpointCallback:
    """The callback that saves at the end of every epoch, and whenever else the options say."""
    import flax_partial as fp
    from flax_partial.callbacks import FinalizeHook, PartialCheckpointCallback

    return PartialCheckpointCallback(
        options.directory,
        every_n_epochs=1,
        every_n_train_steps=options.checkpoint_every,
        group_by=lambda path: str(path[0].key),  # what no stage streams: keys, counters, metrics
        keep_last=KEEP_LAST,
        finalizer=FinalizeHook(),
        # Saving after every step, training would otherwise run further and further ahead.
        options=fp.SaveOptions(max_inflight_bytes=MAX_INFLIGHT_BYTES),
    )


def train(options: argparse.Namespace, corpus: Corpus) -> None:
    """Trains from the newest checkpoint, or from the beginning, and shows what came of it."""
    from lm_model import ModelConfig
    from lm_module import LanguageModel
    from lm_screen import Screen
    from trainer import Trainer

    checkpoints = None if options.no_checkpoint else make_callback(options)
    screen = Screen(checkpoints)
    screen.say("Building the model and its pipeline stages.")
    module = LanguageModel(
        ModelConfig(VOCABULARY, LENGTH, options.width, options.layers),
        corpus,
        stages=options.stages,
        batches_per_epoch=options.steps_per_epoch,
        seed=options.seed,
    )
    callbacks = [screen] if checkpoints is None else [screen, checkpoints]
    Trainer(max_epochs=options.epochs, callbacks=callbacks).fit(module)
    screen.show_result(module)


def draw_timeline(options: argparse.Namespace) -> int:
    """Draws the newest checkpoint's timeline, or says how; returns the status of the program."""
    if options.timeline is None:
        print(f"When each layer was saved: flax-partial timeline {options.directory}")
        return 0
    command = [sys.executable, "-P", "-m", "flax_partial", "timeline", options.directory]
    return subprocess.run([*command, "--out", options.timeline], check=False).returncode  # noqa: S603


def how_to_continue(options: argparse.Namespace) -> str:
    """What to say to who stopped a run by Ctrl-C."""
    if options.no_checkpoint:
        return "Interrupted. Nothing was saved, as --no-checkpoint asks."
    import flax_partial as fp

    newest = fp.latest(options.directory)
    if newest is None:
        return "Interrupted before the first checkpoint. Run the same command again to start over."
    return f"Interrupted. Run the same command again to go on from {newest}, or a newer one."


if __name__ == "__main__":
    sys.exit(main())
