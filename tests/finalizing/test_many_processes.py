"""What thousands of processes have saved is finalized, and no directory has entries of all."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import many_processes
import pytest

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path


def test_parts_of_thousands_of_processes_are_one_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c"
    _, chunks = many_processes.make_session(path, 2500, 300)
    assert chunks == 90 * 8 * 4 + 210
    done = fp.finalize(path)
    assert len(done.leaves) == 300 + 1
    assert done.bytes == 90 * (16 << 20) + 210 * (16 << 10) + 8
    assert many_processes.widest(path) < 1100
    assert fp.metadata(path).leaves["params.layers.29.w2"].shape == many_processes.LARGE


def test_share_of_one_of_thousands_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    many_processes.make_session(path, 2500, 20)
    parts = path.with_name("c.partial_save").glob("state/p1/part.*")
    lost = next(part for part in parts if (part / "data").stat().st_size)
    shutil.rmtree(lost)
    process = lost.name.split(".")[2].removeprefix("p")
    with pytest.raises(fp.IncompleteCheckpointError, match=rf"the share of process {process}\b"):
        fp.finalize(path)
