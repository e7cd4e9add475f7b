"""Runs one of the scripts in this folder: `python tests/long_runs stress --trials 20 --seed 0`."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

_HERE = Path(__file__).parent
# What the scripts share with the tests, and what they run; processes that they start find it too.
_FOLDERS = [_HERE, _HERE.parent / "helpers", _HERE.parent / "crash", _HERE.parents[1] / "examples"]


def main() -> None:
    """Runs the script that the first argument names, with the other arguments."""
    scripts = sorted(path.stem for path in _HERE.glob("*.py") if path.stem != "__main__")
    if len(sys.argv) < 2 or sys.argv[1] not in scripts:
        sys.exit(f"usage: python {_HERE.name} {{{','.join(scripts)}}} ...")
    folders = list(map(str, _FOLDERS))
    sys.path[:1] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    name = sys.argv.pop(1)
    sys.argv[0] = str(_HERE / f"{name}.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
