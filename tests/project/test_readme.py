"""Every block of code in README.md and docs/ runs, in order, in an empty directory.

Blocks of one document share their Python names and their directory, in which `examples` and
`benchmarks` lie too. `python` and `sh` blocks are run, other languages are no code. Three kinds are
not run here:

- the README's two `pip install` commands, which `.ci/run` runs, each in an environment of its own;
- those of `docs/loops/`, and `docs/from_lightning.md`, that need another package, which
  `loops/test_loop_docs.py` runs;
- a block under a line `<!-- not run: REASON -->`, because it takes long or needs what is not here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLAIN = ROOT / "docs" / "loops" / "plain.md"
OF_LOOPS = [path for path in DOCUMENTS if path.parent == PLAIN.parent and path != PLAIN]
OF_LOOPS += [ROOT / "docs" / "from_lightning.md"]
LANGUAGES = {"python", "sh", "text", "json"}

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text, first line in the document, why it is not run."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(text: str) -> list[Block]:
    return [
        Block(
            match["language"],
            match["code"],
            text.count("\n", 0, match.start("code")) + 1,
            match["reason"],
        )
        for match in _BLOCK.finditer(text)
    ]


def is_installing(block: Block) -> bool:
    return block.language == "sh" and block.code.startswith("pip install")


def run_blocks(document: Path) -> None:
    """Runs a document's blocks here and now; tracebacks carry the document's name and lines."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(document.read_text()):
        if block.reason or is_installing(block):
            continue
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(document), "exec"), names)  # noqa: S102 - our own document
        elif block.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)


@pytest.mark.parametrize(
    "document", sorted(set(DOCUMENTS) - set(OF_LOOPS)), ids=lambda path: path.name
)
@pytest.mark.timeout(600)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    code = "import pathlib, sys, test_readme; test_readme.run_blocks(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, document],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_are_of_a_known_language(document: Path) -> None:
    text = document.read_text()
    blocks = blocks_of(text)
    assert 2 * len(blocks) == len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert {block.language for block in blocks} <= LANGUAGES


def test_readme_gives_the_two_commands() -> None:
    commands = [b.code for b in blocks_of((ROOT / "README.md").read_text()) if is_installing(b)]
    job, tests = commands
    assert job.rstrip("\n").endswith("python examples/pipeline_lm.py")
    assert "pytest" in tests


def test_a_broken_block_fails_with_its_line(tmp_path: Path) -> None:
    document = tmp_path / "broken.md"
    document.write_text("# Title\n\n```python\nx = 1\n```\n\n```python\nx += 'text'\n```\n")
    with pytest.raises(TypeError) as error:
        run_blocks(document)
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno + 1) == (str(document), 8)
    document.write_text("```sh\nfalse | true\n```\n")
    with pytest.raises(subprocess.CalledProcessError):
        run_blocks(document)
