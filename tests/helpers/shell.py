"""Runs commands of `flax-partial`, and makes checkpoints for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from things import QUICK

import flax_partial as fp
from flax_partial.cli.main import FINE, main

MIXED = {
    "params": {"w": np.arange(6000, dtype=np.float32).reshape(60, 100), "b": jnp.zeros(3)},
    "half": jnp.ones((2, 2), jnp.bfloat16),
    "tiny": np.arange(4).astype(ml_dtypes.int4),
    "eighth": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "text": "a\x1b[31m",
    "nothing": None,
    "empty": {},
    "step": 3,
}


class Shell:
    """Runs commands in this process, and catches what they write.

    Attributes:
      error: What the last one wrote to standard error.
    """

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.error = ""

    def run(self, *arguments: object, status: int = FINE) -> str:
        """Runs a command, which has to end with a status; returns its standard output."""
        self._capture.readouterr()
        got = main([str(argument) for argument in arguments])
        output, self.error = self._capture.readouterr()
        assert got == status, output + self.error
        return output

    def json(self, *arguments: object, status: int = FINE) -> Any:
        """Runs a command with `--json`; returns what it wrote."""
        return json.loads(self.run(*arguments, "--json", status=status))


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def begin(path: Path, state: Any, **metadata: Any) -> Path:
    """Saves one part of an unfinished checkpoint."""
    fp.save(path, state, options=QUICK, custom_metadata=metadata)
    return path


def write(path: Path, state: Any, **metadata: Any) -> Path:
    """Writes a finalized checkpoint."""
    fp.finalize(begin(path, state, **metadata))
    return path


def flip_a_bit_of(path: Path, array: np.ndarray) -> None:
    """Damages an array's data, wherever it lies."""
    whole = array.tobytes()
    (file,) = [f for f in path.rglob("*") if f.is_file() and whole in f.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(whole)] ^= 1
    file.write_bytes(data)
