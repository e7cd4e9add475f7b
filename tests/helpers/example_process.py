"""Runs the example programs as a user does, in processes that share what they compile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import flax_partial as fp

if TYPE_CHECKING:
    from collections.abc import Callable

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--layers", 4, "--width", 32, "--epochs", 2)
LIMIT_SECS = 600  # a hang, not a busy machine
_DIGEST = re.compile(r"^(?:parameters|optimizer state): +([0-9a-f]{16})$", re.MULTILINE)


class Ended(NamedTuple):
    """A process that has ended: its exit status, and what it wrote to both outputs."""

    status: int
    output: str
    errors: str


class Example:
    """Starts a program with options that stay the same."""

    def __init__(self, script: str, cache: Path, *options: object) -> None:
        self._command: list[str | Path] = [sys.executable, EXAMPLES / script, *map(str, options)]
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def run(
        self,
        *options: object,
        until: Callable[[list[str]], bool] | None = None,
        delay_secs: float = 0.0,
        how: signal.Signals = signal.SIGKILL,
    ) -> Ended:
        """Runs to the end, or sends a signal `delay_secs` after the lines so far fulfil `until`."""
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [*self._command, *map(str, options)],
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            watchdog = threading.Timer(LIMIT_SECS, process.kill)
            watchdog.start()
            lines: list[str] = []
            assert process.stdout is not None
            if until is not None:
                while not until(lines) and (line := process.stdout.readline()):
                    lines.append(line)
                time.sleep(delay_secs)
                process.send_signal(how)
            lines.extend(process.stdout)
            status = process.wait()
            watchdog.cancel()
            errors.seek(0)
            return Ended(status, "".join(lines), errors.read())

    def complete(self, *options: object) -> str:
        """Returns its output, after it ended well."""
        ended = self.run(*options)
        assert (ended.status, ended.errors) == (0, ""), ended
        return ended.output


def digests(output: str) -> list[str]:
    """Returns the printed fingerprints of parameters and optimizer state."""
    return _DIGEST.findall(output)


def leaves_of(path: Path, *roots: str) -> dict[str, Any]:
    """Returns a checkpoint's leaves below some roots, else all, by name, as NumPy."""
    state = {root: tree for root, tree in fp.load(path).items() if not roots or root in roots}
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(key): _as_numpy(leaf) for key, leaf in flat}


def _as_numpy(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compares what two calls of `leaves_of` returned."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert value.tobytes() == theirs[name].tobytes(), name
