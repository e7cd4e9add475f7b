"""Killed before or after any request, what was acknowledged is there, and the next goes on."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from stores import Death, Killed, another_process, memory, requests_through

import flax_partial as fp

BIG = {name: np.full(4000, at, np.float32) for at, name in enumerate("abc")}
SCRIPTS = {
    "save twice and finalize": ("a", "b", "finalize"),
    "save twice and abort": ("a", "b", "abort"),
    "finalize and remove": ("a", "finalize", "remove"),
}


def state_of(name: str) -> dict[str, Any]:
    return {name: BIG[name], f"{name}_step": 3}


def run(path: str, script: tuple[str, ...], done: list[str]) -> None:
    for step in script:
        if step in BIG:
            fp.save(path, state_of(step))
        else:
            {"finalize": fp.finalize, "abort": fp.abort, "remove": fp.remove}[step](path)
        done.append(step)


def loaded(path: str) -> set[str] | None:
    """The groups that are in the checkpoint, each whole; None where there is none."""
    try:
        got = fp.load(path)
    except fp.NoSessionError:
        return None
    for name in set(BIG) & set(got):
        assert (got[name] == BIG[name]).all()
        assert got[f"{name}_step"] == 3
    return set(BIG) & set(got)


def follow(path: str, script: tuple[str, ...], done: list[str]) -> None:
    """What the next process finds, and can do."""
    found = loaded(path)
    saved = set(BIG) & set(done)
    assert found is None or found >= saved
    if "remove" in script and "finalize" in done:
        return  # it is whole, or gone
    if "abort" in script and saved == {"a", "b"}:
        assert found is None
        if "abort" not in done:
            with contextlib.suppress(fp.NoSessionError):
                fp.abort(path)
        fp.save(path, state_of("c"))
        fp.finalize(path)
        assert loaded(path) == {"c"}
        return
    try:
        fp.finalize(path)
    except fp.CheckpointExistsError:
        assert found is not None
    except (fp.NoSessionError, fp.IncompleteCheckpointError):
        assert not saved
        return
    after = loaded(path)
    assert after is not None
    assert after >= saved
    assert fp.verify(path).ok


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_killed_at_each_request(script: tuple[str, ...], after: bool) -> None:  # noqa: FBT001
    for at in itertools.count(1):
        path, done = memory(), list[str]()
        another_process()
        death = Death(at, after=after)
        with requests_through(death), contextlib.suppress(Killed):
            run(path, script, done)
        if not death.is_dead:
            break
        another_process()
        follow(path, script, done)
    assert at > 15
