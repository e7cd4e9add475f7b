"""Imports a package after JAX and tensorstore, for the scenario `import_time`.

Run as `python -m benchmarks.import_process PACKAGE`, in a fresh process each time. Prints what it
measured, as JSON.
"""

import importlib
import json
import sys
import time

import jax  # noqa: F401 - what is not measured
import tensorstore  # noqa: F401

from benchmarks.memory_use import peak_growth


def main() -> None:
    """Imports what the command line says."""
    with peak_growth() as growth:
        start = time.perf_counter()
        importlib.import_module(sys.argv[1])
        total = time.perf_counter() - start
    print(json.dumps({"total": total, "memory": growth.bytes}))


if __name__ == "__main__":
    main()
