"""What docs/cli.md shows is what the command line says, and the fields it lists are those."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from documents import ROOT, blocks_of
from stub_trainer import Loop

import flax_partial as fp
from flax_partial.callbacks import PartialCheckpointCallback

if TYPE_CHECKING:
    from pathlib import Path

    from shell import Shell

DOCUMENT = ROOT / "docs" / "cli.md"
# Maps of names of the user's own.
_FREE = {"custom_metadata", "training", "metrics", "sharding", "bad", "widened", "blocked_secs"}


def plain(text: str, home: Path) -> list[str]:
    """Lines without what differs from run to run: where, when, how long, and so how wide."""
    text = text.replace(str(home), "/home/you")
    text = re.sub(r"now\b|\d+ (s|min|h) ago", "AGE", text)
    text = re.sub(r"\d+\.\d+ s$|(?<=\"secs\": )[\d.e-]+", "SECS", text, flags=re.MULTILINE)
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each block of commands with what the document says it prints, where its Python has run."""
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(DOCUMENT.read_text())
    names: dict[str, Any] = {}
    for block in blocks:
        if block.language == "python":
            exec(block.code, names)  # noqa: S102 - our own document
    return [(block.code, said.code) for block, said in pairwise(blocks) if block.language == "sh"]


def test_commands_say_what_the_document_shows(
    examples: list[tuple[str, str]], shell: Shell, tmp_path: Path
) -> None:
    assert len(examples) >= 7
    for commands, said in examples:
        output = ""
        for line in commands.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "flax-partial"
            status = re.search(r"# status (\d)", line)
            output += shell.run(*arguments, status=int(status[1]) if status else 0)
        assert plain(output, tmp_path) == plain(said, tmp_path)


def fields(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(fields, value))
    if not isinstance(value, dict):
        return set()
    return set(value).union(*(fields(v) for key, v in value.items() if key not in _FREE))


@pytest.mark.usefixtures("examples")
def test_fields_of_json_are_those_that_the_document_lists(shell: Shell) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE))
    run = "runs/lm"
    commands = {
        "ls": [[run]],
        "show": [[f"{run}/100"]],
        "status": [[f"{run}/400"]],
        "verify": [[f"{run}/100"], [run]],
        "diff": [[f"{run}/100", f"{run}/200"], [f"{run}/100", "other"]],
        "export": [[f"{run}/100", "out"]],
        "import": [["out", "imported"]],
        "completion": [["bash"]],
        "timeline": [["trained"]],
        "finalize": [[f"{run}/400"]],
        "abort": [[f"{run}/500", "--yes"]],
        "latest": [[run]],
        "rm": [[f"{run}/400", "--yes"]],
        "prune": [[run, "--keep-last", "1", "--dry-run"]],
    }
    assert set(commands) == set(rows)
    if importlib.util.find_spec("shtab") is None:
        del commands["completion"]
    Loop(PartialCheckpointCallback("trained")).fit()
    fp.save("other", {"note": "other"})
    fp.finalize("other")
    fp.save(f"{run}/500", {"note": "dropped"})
    for command, calls in commands.items():
        found = set().union(
            *(
                fields(shell.json(command, *arguments, status=int(command == "diff")))
                for arguments in calls
            )
        )
        documented = set(re.findall(r"`(\w+)`", rows[command]))
        values = {"finalized", "unfinished", "damaged", "dropped", "flax_partial", "orbax"}
        values |= {"safetensors"}
        values |= {"added", "removed", "values", "unreadable", "PRNG"}
        assert found <= documented, command
        assert documented - found <= values | {"kind", "dropped"}, command


def test_json_is_one_line(examples: list[tuple[str, str]]) -> None:
    (said,) = [said for commands, said in examples if "--json" in commands]
    assert json.loads(said)["ok"]
    assert said.count("\n") == 1
