"""Processes of their own, for work that needs a fresh one: each prints what it measured as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.harness import Metrics

_LIMIT_SECS = 300


def run(
    module: str,
    *arguments: object,
    devices: int = 1,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Metrics:
    """Runs a module of this package, and waits for it.

    Args:
      module: Its name below `benchmarks`.
      arguments: Its command line.
      devices: Virtual CPU devices that JAX has in it.
      environment: Added to this process's own.

    Returns:
      What it printed in its last line.
    """
    running = start(module, *arguments, devices=devices, environment=environment)
    try:
        return answer(running)
    finally:
        running.kill()


def start(
    module: str,
    *arguments: object,
    devices: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Starts a module of this package; arguments as for `run`."""
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        | dict(environment),
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(running: subprocess.Popen[str]) -> Metrics:
    """Waits for a process that `start` started, and returns what it measured.

    Raises:
      RuntimeError: It failed.
    """
    out, err = running.communicate(timeout=_LIMIT_SECS)
    if running.returncode:
        raise RuntimeError(f"a process of the benchmark failed:\n{err[-4000:]}")
    metrics: Metrics = json.loads(out.splitlines()[-1])
    return metrics
