"""Where the system lacks what Linux has, all works: Linux with masks on stands for macOS."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import other_systems
import pytest
from other_systems import MASKS, TOGETHER

from flax_partial.saving import memory_budget
from flax_partial.storage import files


@pytest.mark.parametrize("mask", MASKS)
def test_all_works_under_a_mask(mask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_budget._malloc_trim.cache_clear()  # noqa: SLF001 - it is looked for once
    MASKS[mask](monkeypatch)
    other_systems.tour(tmp_path)
    memory_budget._malloc_trim.cache_clear()  # noqa: SLF001


@pytest.mark.parametrize("masks", TOGETHER)
def test_all_works_where_masks_were_on_before_the_import(masks: str, tmp_path: Path) -> None:
    script = str(Path(other_systems.__file__))
    subprocess.run(
        [sys.executable, "-W", "error", script, tmp_path, masks], check=True, timeout=500
    )


def test_disk_that_fails_to_sync_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again by fsync, which may report success: an error is reported once."""
    other_systems.full_sync_refused(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.write(tmp_path / "file", (b"data",), durable=True)


WINDOWS = """
import sys

class NoFcntl:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ImportError("No module named 'fcntl'")

sys.modules.pop("fcntl", None)
sys.meta_path.insert(0, NoFcntl())
sys.platform = "win32"
import {module}
"""


@pytest.mark.parametrize("module", ["flax_partial", "flax_partial.callbacks", "flax_partial.cli"])
def test_on_windows_the_import_says_what_is_needed(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS.format(module=module)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: flax_partial needs Linux or macOS: "
    )
    assert "During handling" not in done.stderr
