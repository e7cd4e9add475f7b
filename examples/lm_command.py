"""The command line that the examples share: options, checks, the run's directory, exit status.

JAX reads its environment when it is imported, so everything that imports it stands in functions.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import lm_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_model import ModelConfig
    from lm_text import Batches

DEVICES = 4
VOCABULARY = 4096
LENGTH = 64
KEEP_LAST = 3


class UsageError(Exception):
    """The options conflict with each other or with the text."""


def make_parser(description: str, directory: str) -> argparse.ArgumentParser:
    """Returns a parser with the shared options; `directory` is the default for checkpoints."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Run the same command again to go on where the last run stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--directory", type=Path, default=Path(directory), help="of the checkpoints")
    add("--epochs", type=at_least(1), default=4, metavar="N", help="train up to this epoch")
    add("--stages", type=at_least(1), default=4, metavar="N", help="pipeline stages")
    every = "checkpoint after each so many steps too, not only after each epoch"
    add("--checkpoint-every", type=at_least(1), metavar="STEPS", help=every)
    drawn = "draw there what the newest checkpoint did when: .png, .svg, or .json for Perfetto"
    add("--timeline", type=_drawable, metavar="FILE", help=drawn)
    add("--no-checkpoint", action="store_true", help="neither resume nor save anything")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of model, dropout and shuffling")
    add = parser.add_argument_group("size of the model and of an epoch").add_argument
    add("--layers", type=at_least(1), default=8, metavar="N", help="blocks")
    add("--width", type=at_least(1), default=128, metavar="N", help="features")
    batches = "batches of an epoch"
    add("--steps-per-epoch", type=at_least(1), default=48, metavar="N", help=batches)
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """Returns an option's type: a whole number from `least` to 2**32 - 1."""

    def number(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) < 2**32):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def _drawable(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg", ".json"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .svg or .json")
    return Path(text)


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    check: Callable[[argparse.Namespace], Batches],
    work: Callable[[argparse.Namespace, Batches], int],
    claims: bool,
) -> int:
    """Runs an example; returns its exit status: 2 for wrong options, 130 for Ctrl-C.

    Args:
        parser: reports wrong options, and exits.
        options: what it parsed.
        check: raises `UsageError` for wrong options; returns the batches to train on.
        work: trains; returns the exit status.
        claims: whether to lock the run's directory during the work.
    """
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        batches = check(options)
        with contextlib.ExitStack() as stack:
            if claims:
                stack.enter_context(lm_directory.claim(options.directory, _fixed(options, batches)))
            return work(options, batches)
    except UsageError as error:
        parser.error(str(error))
    except lm_directory.DirectoryError as error:
        parser.error(f"argument --directory: {error}")
    except KeyboardInterrupt:
        print(_how_to_continue(options), file=sys.stderr)
        return 130


def read_text(options: argparse.Namespace, *, windows: int) -> Batches:
    """Checks the model's width and the epoch's length; returns the batches to train on.

    Raises:
        UsageError: no model has this width, or the text is too short for batches of `windows`.
    """
    from lm_model import HEAD_WIDTH
    from lm_text import Batches, count_windows, read_corpus

    if options.width % HEAD_WIDTH:
        raise UsageError(f"argument --width: {options.width} is not a multiple of {HEAD_WIDTH}")
    corpus = read_corpus(VOCABULARY)
    most = count_windows(corpus, LENGTH) // windows
    if options.steps_per_epoch > most:
        raise UsageError(
            f"argument --steps-per-epoch: {options.steps_per_epoch} batches are more than the "
            f"{most} that the text has"
        )
    return Batches(corpus, LENGTH, windows, options.steps_per_epoch)


def model_config(options: argparse.Namespace) -> ModelConfig:
    """Returns the sizes of the model, from the options."""
    from lm_model import ModelConfig

    return ModelConfig(VOCABULARY, LENGTH, options.width, options.layers)


def _fixed(options: argparse.Namespace, batches: Batches) -> dict[str, int | str]:
    """What must be the same when a run is continued; the text differs between Python versions."""
    names = ("seed", "layers", "width", "steps_per_epoch")
    chosen = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    return {**chosen, "text": batches.corpus.digest}


def draw_timeline(options: argparse.Namespace) -> int:
    """Draws the newest checkpoint's timeline, or prints how; returns the exit status."""
    if options.timeline is None:
        print(f"When each layer was saved: flax-partial timeline {options.directory}")
        return 0
    command = [sys.executable, "-P", "-m", "flax_partial", "timeline", options.directory]
    return subprocess.run([*command, "--out", options.timeline], check=False).returncode  # noqa: S603


def _how_to_continue(options: argparse.Namespace) -> str:
    if options.no_checkpoint:
        return "Interrupted. Nothing was saved, as --no-checkpoint asks."
    import flax_partial as fp

    newest = fp.latest(options.directory)
    if newest is None:
        return "Interrupted before the first checkpoint. Run the same command again to start over."
    return f"Interrupted. Run the same command again to go on from {newest}, or a newer one."
