"""Each promise of `docs/guarantees.md` names the tests that hold it, and they are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


@cache
def names_in(file: str) -> frozenset[str]:
    """What a module defines at its top."""
    tree = ast.parse((TESTS / file).read_text())
    assigned = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return frozenset(defined | {target.id for target in assigned if isinstance(target, ast.Name)})


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_named_test_is_there(file: str, name: str) -> None:
    assert name.lower().startswith("test")
    assert name in names_in(file)


def test_every_promise_names_a_test() -> None:
    promises = TEXT[TEXT.index("## Each promise") : TEXT.index("## What is not guaranteed")]
    items = re.split(r"^- ", promises, flags=re.MULTILINE)[1:]
    assert len(items) > 20
    assert not [item for item in items if "::" not in item]


def test_every_script_that_is_named_is_there() -> None:
    runs = TEXT[TEXT.index("## Longer runs") :]
    scripts = re.findall(r"^\| `tests/([\w/]+\.py)", runs, re.MULTILINE)
    assert len(scripts) >= 5
    assert all((TESTS / script).is_file() for script in scripts)
