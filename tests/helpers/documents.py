"""The pages of the project, and the blocks of code in them.

Blocks of one page share their Python names and their directory. `python` and `sh` blocks are run,
other languages are no code. A block under a line `<!-- not run: REASON -->` is not run, because it
takes long or needs what is not here; nor are the README's `pip install` commands, which `.ci/run`
runs, each in an environment of its own.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLAIN = ROOT / "docs" / "loops" / "plain.md"
OF_LOOPS = [path for path in DOCUMENTS if path.parent == PLAIN.parent and path != PLAIN]
OF_LOOPS += [ROOT / "docs" / "from_lightning.md"]
GUIDES = [path for path in DOCUMENTS if path.parent.name == "guides"]
GUIDES += [PLAIN, ROOT / "docs" / "slurm.md"]

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


def run_blocks(document: Path, *, times: int = 1) -> None:
    """Runs a document's blocks here and now; tracebacks carry the document's name and lines.

    Args:
      document: The document.
      times: How often its Python is run; the commands of its shell, which look at what is there,
        are run the first time only.
    """
    blocks = [
        block
        for block in blocks_of(document.read_text())
        if not (block.reason or is_installing(block))
    ]
    for turn in range(times):
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks:
            if block.language == "python":
                source = "\n" * (block.line - 1) + block.code
                exec(compile(source, str(document), "exec"), names)  # noqa: S102 - our own document
            elif block.language == "sh" and turn == 0:
                subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
