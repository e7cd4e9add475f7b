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
    found: list[list[Path]] = []
    for _ in range(2):
        if package == "keras":
            sys.modules[package].utils.clear_session()  # names begin anew, as in a new process
        documents.run_blocks(document)
        found.append(sorted(tmp_path.glob("runs/*/*/_CHECKPOINT_METADATA")))
    assert found[0]
    assert found[0] == found[1]  # it was done already


@pytest.mark.parametrize(
    "document", [*documents.OF_LOOPS, documents.PLAIN], ids=lambda path: path.stem
)
def test_the_example_is_short(document: Path) -> None:
    example = documents.blocks_of(document.read_text())[-1]
    assert example.language == "python"
    assert len(example.code.splitlines()) <= MAX_LINES
