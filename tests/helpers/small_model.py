"""A model of a few numbers, trained in JAX: what the tests of loops train."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def new_state() -> dict[str, Any]:
    params = {"embed": jnp.ones((4, 3)), "head": jnp.full((3,), 2.0)}
    return {"params": params, "opt_state": jax.tree.map(jnp.zeros_like, params)}


@functools.partial(jax.jit, donate_argnums=0)
def train(state: dict[str, Any], batch: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """One step of gradient descent with momentum; each batch leaves its mark."""
    momentum = jax.tree.map(
        lambda m, p: jnp.float32(0.9) * m + jnp.sin(p + batch), state["opt_state"], state["params"]
    )
    params = jax.tree.map(lambda p, m: p - jnp.float32(0.1) * m, state["params"], momentum)
    return {"params": params, "opt_state": momentum}, jnp.sum(params["head"])


def assert_equal(got: Any, want: Any) -> None:
    """Bit-identical, and of the same structure."""
    jax.tree.map(np.testing.assert_array_equal, got, want)


def run_until_killed(code: str, beside: str, directory: Path) -> None:
    """Runs a program, in the folder of the test file `beside`, that kills itself.

    Args:
      code: The program, whose argument is `directory`.
      beside: The `__file__` of a test, which the program may import.
      directory: Where it trains.
    """
    done = subprocess.run(
        [sys.executable, "-c", code, directory],
        check=False,
        cwd=Path(beside).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
