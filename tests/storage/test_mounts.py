"""What can be mounted here holds checkpoints: file systems of the kernel, and some by FUSE."""

from __future__ import annotations

import sys
from pathlib import Path

import mounts
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="it mounts as Linux does")
@pytest.mark.parametrize("name", mounts.MOUNTS)
def test_all_works_on_a_file_system(name: str, tmp_path: Path) -> None:
    """Two processes save side by side, and a run goes on after SIGKILL."""
    try:
        mounts.tour(name, tmp_path)
    except mounts.CannotMountError as error:
        pytest.skip(str(error))
