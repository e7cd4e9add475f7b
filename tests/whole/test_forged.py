"""Tables of contents that are whole and wrong: read, or refused by name; nothing else happens.

All of it runs in a process apart, which would be seen to hang, to die, or to ask for memory.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import forged
import fuzz
import numpy as np
import pytest
from things import QUICK, stored

import flax_partial as fp

if TYPE_CHECKING:
    from pathlib import Path

    from isolated import Isolated, Outcome

# What the longest of these tables, decoded, takes at most, and libraries that are used for the
# first time, which differs by 20 MiB. What unfolds a table would take 125 MiB for that alone.
MOST_BYTES = 96 << 20
SAVED: dict[str, Any] = {"a": np.arange(3), "b": "text", "large": np.zeros(40_000, np.uint8)}


def read_all(path: Path) -> dict[str, str]:
    """What each call on a finalized checkpoint comes to."""
    report = fp.verify(path)
    return {"verify": "ok" if report.ok else "; ".join(report.bad.values())} | {
        call.__name__: told(call, path) for call in (fp.load, fp.metadata)
    }


def finalize_all(path: Path) -> dict[str, str]:
    """What each call on a session comes to, saving into it first."""
    outcomes = {"save": told(fp.save, path, {"z": {"z": 1}})}
    names = ("a", "k.k.k", "list.0")
    outcomes |= {"expecting": told(lambda path: fp.finalize(path, expect=names), path)}
    outcomes |= {call.__name__: told(call, path) for call in (fp.status, fp.finalize)}
    return outcomes | (read_all(path) if path.exists() else {})


def told(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except fp.PartialCheckpointError as error:
        return type(error).__name__
    return "ok"


def assert_harmless(outcome: Outcome, most_bytes: int = MOST_BYTES) -> dict[str, str]:
    assert outcome.error is None, repr(outcome.error)
    assert outcome.peak_bytes < most_bytes
    return dict(outcome.value)


@pytest.mark.parametrize("name", forged.NAMES)
def test_checkpoint_with_a_forged_table_is_read_or_refused(
    name: str, tmp_path: Path, apart: Isolated
) -> None:
    report = stored(tmp_path / "c", SAVED)
    table = forged.table(name, forged.contents_head(report.part))
    (tmp_path / "c" / "state" / "contents.json").write_bytes(table)
    outcomes = assert_harmless(apart.call(read_all, tmp_path / "c"))
    assert outcomes["verify"] != "ok"  # it is not what the parts add up to


@pytest.mark.parametrize("name", forged.NAMES)
def test_session_with_a_forged_table_is_finalized_or_refused(
    name: str, tmp_path: Path, apart: Isolated
) -> None:
    part = fp.save(tmp_path / "c", SAVED, options=QUICK).part
    table = forged.table(name, forged.part_head(part))
    (tmp_path / "c.partial_save" / "state" / part / "part.json").write_bytes(table)
    assert_harmless(apart.call(finalize_all, tmp_path / "c"))


@pytest.mark.parametrize("compression", ["zstd", "blosc"])
def test_compressed_chunk_that_unfolds_to_much_more_is_damage(
    compression: str, tmp_path: Path, apart: Isolated
) -> None:
    """256 MiB of zeros, in a few KiB, in the place of a chunk of 5,000 bytes; without digests."""
    options = fp.SaveOptions(
        compression=compression, checksum=False, durable=False, chunk_bytes=1 << 30
    )
    bomb = fp.save(tmp_path / "bomb", {"a": np.zeros(256 << 20, np.uint8)}, options=options)
    data = (tmp_path / "bomb.partial_save" / "state" / bomb.part / "data").read_bytes()
    report = fp.save(tmp_path / "c", {"a": np.arange(5_000, dtype=np.uint8)}, options=options)
    part = tmp_path / "c.partial_save" / "state" / report.part
    table = json.loads((part / "part.json").read_bytes())["table"]
    table["leaves"][0]["boxes"][0][3] = [[0, len(data)]]
    (part / "part.json").write_bytes(forged.envelope(json.dumps(table).encode()))
    (part / "data").write_bytes(data)
    fp.finalize(tmp_path / "c")
    outcomes = assert_harmless(apart.call(read_all, tmp_path / "c"))
    assert outcomes["load"] == "CorruptCheckpointError"
    assert "'a'" in outcomes["verify"]


def test_table_changed_at_random_is_read_or_refused(tmp_path: Path) -> None:
    """A few trials of `fuzz.py`, which says what holds; a script for many more."""
    trial = fuzz.start(tmp_path)
    faults = {seed: found for seed in range(90) if (found := trial(seed)[1])}
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["d", "s"])
def test_a_million_nested_keys_take_what_their_nodes_take(
    kind: str, tmp_path: Path, apart: Isolated
) -> None:
    key = {"d": "k", "s": "0"}[kind]
    rows = [forged.text([key] * 1_000_000, kind * 1_000_000)]
    part = fp.save(tmp_path / "c", SAVED, options=QUICK).part
    table = forged.table_of(rows, forged.part_head(part))
    (tmp_path / "c.partial_save" / "state" / part / "part.json").write_bytes(table)
    outcomes = assert_harmless(apart.call(finalize_all, tmp_path / "c"), 1 << 30)
    assert outcomes["expecting"] == "IncompleteCheckpointError"
