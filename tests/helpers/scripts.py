"""Short scripts in a Python of their own: how they end, and what they leave, is what is tested."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

_BEGIN = """
import os, signal, sys, threading, warnings
import numpy as np
import flax_partial as fp

path = sys.argv[1]
"""
# No save commits before `gate` is set.
GATED = """
from flax_partial.storage import session_dir
commit, gate = session_dir.commit_part, threading.Event()

def commit_at_gate(*arguments, **options):
    assert gate.wait(250)
    commit(*arguments, **options)

session_dir.commit_part = commit_at_gate
"""


def run(path: Path, *pieces: str) -> subprocess.CompletedProcess[str]:
    """Runs pieces of code, with the name `path`, one after another; warnings are errors."""
    script = "\n".join([_BEGIN, *map(textwrap.dedent, pieces)])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def run_well(path: Path, *pieces: str) -> str:
    """Runs them to a good end, without a word on standard error; what they printed."""
    done = run(path, *pieces)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
