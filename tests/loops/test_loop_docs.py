"""Each kind of loop has a page, whose example is short and runs with the package it is about."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import documents
import pytest

if TYPE_CHECKING:
    from pathlib import Path

MAX_LINES = 15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("document", documents.OF_LOOPS, ids=lambda path: path.stem)
def test_blocks_run_and_resume(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported the package: most of them take seconds."""
    package = document.stem.removeprefix("from_")
    pytest.importorskip(package, reason=f"pip install 'flax-partial[{package}]'")
    monkeypatch.chdir(tmp_path)
    documents.run_blocks(document)
    found = sorted(tmp_path.glob("runs/*/*/_CHECKPOINT_METADATA"))
    assert found
    if package == "keras":
        sys.modules[package].utils.clear_session()  # so that names begin anew, as in a new process
    documents.run_blocks(document)
    assert sorted(tmp_path.glob("runs/*/*/_CHECKPOINT_METADATA")) == found  # it was done already


@pytest.mark.parametrize(
    "document", [*documents.OF_LOOPS, documents.PLAIN], ids=lambda path: path.stem
)
def test_the_example_is_short(document: Path) -> None:
    example = documents.blocks_of(document.read_text())[-1]
    assert example.language == "python"
    assert len(example.code.splitlines()) <= MAX_LINES
