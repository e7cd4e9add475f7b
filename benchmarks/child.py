"""Runs functions of scenarios in fresh processes, for work that another run would distort.

A process is `python -m benchmarks.child MODULE FUNCTION ARGUMENTS`, the last a JSON list. It prints
the metrics that the function returns, as JSON, in its last line.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from benchmarks.harness import Metrics

_LIMIT_SECS = 300


def run(
    function: Callable[..., Metrics],
    *arguments: object,
    **options: Any,
) -> Metrics:
    """Calls a function in one process, as `run_together` with these options; returns its metrics.

    The arguments are what JSON can hold, and paths, which arrive as strings.
    """
    (metrics,) = run_together(function, [arguments], **options)
    return metrics


def run_together(
    function: Callable[..., Metrics],
    calls: Iterable[Sequence[object]],
    *,
    devices: int = 1,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[Metrics]:
    """Calls a function in one process for each list of arguments, all at a time.

    Args:
      function: A module's own, in this package.
      calls: The arguments of each process: what JSON can hold, and paths, which arrive as strings.
      devices: Virtual CPU devices that JAX has in each process.
      environment: Variables added to this process's own.

    Returns:
      What the function returned in each process.

    Raises:
      RuntimeError: A process failed.
    """
    command = [sys.executable, "-m", "benchmarks.child", function.__module__, function.__qualname__]
    flags = f"--xla_force_host_platform_device_count={devices}"
    ours = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    ours["PYTHONDONTWRITEBYTECODE"] = ""  # or each import would be compiled anew, and timed so
    running = [
        subprocess.Popen(  # noqa: S603 - our own module
            [*command, json.dumps(arguments, default=str)],
            env={**os.environ, **ours, **environment},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in calls
    ]
    try:
        return [_metrics_of(process) for process in running]
    finally:
        for process in running:
            process.kill()


def _metrics_of(process: subprocess.Popen[str]) -> Metrics:
    out, err = process.communicate(timeout=_LIMIT_SECS)
    if process.returncode:
        raise RuntimeError(f"a process of the benchmark failed:\n{err[-4000:]}")
    metrics: Metrics = json.loads(out.splitlines()[-1])
    return metrics


def main() -> None:
    """Calls the function that the command line names, and prints what it returns."""
    module, function, arguments = sys.argv[1:]
    metrics = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
